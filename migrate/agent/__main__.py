from migrate.agent.server import main

main()

# make demo    two hosts on this machine, a container that counts, a move there and back
# make test    everything: lint, types, unit, integration and end-to-end tests (needs root)
# make check   lint, types and unit tests (no root, any machine)
# make setup   what the first two call; leaves the commands in .venv/bin
# make bench   Ferry against the scripts of today, on the same bed
.PHONY: demo test check setup bench wire
# A caller may have turned bytecode files off; every start of a command would then compile all of it anew.
unexport PYTHONDONTWRITEBYTECODE
bin := .venv/bin

setup:
	@scripts/setup

demo: setup
	@scripts/demo

check:
	@scripts/setup --python
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy
	$(bin)/pytest -q tests/unit

test: setup check
	$(bin)/pytest tests/integration tests/e2e

bench: setup
	@$(bin)/python tests/bench/run.py

wire:
	$(bin)/python -m grpc_tools.protoc -Imigrate --python_out=migrate --pyi_out=migrate migrate/wire.proto

# make demo    two hosts on this machine, a container that counts, a move there and back
# make test    everything: lint, types, unit, integration and end-to-end tests, and those in a guest (needs root)
# make test-guest   the tests in a Debian guest with systemd and cgroup v2, under QEMU
# make test-vm      the tests with two such guests: memory tracking, moves from kernel to kernel
# make test-fault   every fault at every entry of a move's journal: one class of faults, which one goes round with the commits
# make test-fault-all   all classes
# make soak   ten minutes of moves to and fro, with faults at random from a seed that is printed
# make test-fault-mutants   builds that are broken on purpose, each of which the faults must find
# make box     the box for vagrant/, out of the guests' image
# make check   lint, types and unit tests (no root, any machine)
# make setup   what the first two call; leaves the commands in .venv/bin
# make bench   Ferry against the scripts of today, on the same bed
# make bench-served   servers that move under load over a link of 1 Gbit/s, against the scripts of today with runc and podman
# make bench-guests   moves between two guests, against a loop of pre-dumps with the kernel's own tracking
# make bench-checkpoint   checkpoint and restore against runc with the same CRIU, from 16 MiB to 4 GiB
.PHONY: demo test test-guest test-vm test-fault test-fault-all test-fault-mutants test-runtime test-moves soak box check setup bench bench-checkpoint bench-guests bench-served wire
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

commits := $(shell git rev-list --count HEAD)
# On a slow machine one with each commit.
guests := $(if $(filter 3 4,$(FERRY_SHARE)),$(if $(filter %0 %2 %4 %6 %8,$(commits)),test-guest,test-vm),test-guest test-vm)
faults := tests/fault/test_every_entry.py

# Two lanes side by side, about as long as each other: a bed's hosts are its own, so neither sees what the other does. Guests take a
# whole machine.
test: setup check
	@scripts/install-packages --tests
	@$(MAKE) --no-print-directory --output-sync=target -j2 test-runtime test-moves
	@$(MAKE) --no-print-directory $(guests)

test-runtime:
	$(bin)/pytest tests/fuzz tests/integration
	$(bin)/pytest -s $(faults)

test-moves:
	$(bin)/pytest --durations 10 tests/e2e
	$(bin)/pytest -s tests/fault/test_soak.py --soak-minutes 1

guest_tests := tests/guest $(addprefix tests/integration/test_,cgroups.py verbs.py lifecycle.py)
test-guest:
	@scripts/guest run 'FERRY_SHARE=$(FERRY_SHARE) FERRY_COMMITS=$(commits) python3 -m pytest -q --color=no -p no:cacheprovider -m v2 --basetemp=/var/tmp/tests $(guest_tests)'

test-vm:
	@scripts/install-python
	$(bin)/pytest tests/vm

test-fault: setup
	$(bin)/pytest -s $(faults)

test-fault-all: setup
	FERRY_FAULTS=all $(bin)/pytest -s $(faults)

test-fault-mutants: setup
	$(bin)/pytest -s tests/fault/test_mutants.py

soak: setup
	$(bin)/pytest -s tests/fault/test_soak.py --soak-minutes 10

box:
	@scripts/box

bench: setup
	@$(bin)/python tests/bench/run.py

bench-checkpoint: setup
	@$(bin)/python tests/bench/checkpoint.py

bench-served: setup
	@scripts/install-packages --tests
	@scripts/install-python --bench
	@$(bin)/python tests/bench/served.py --plot docs/served.svg

bench-guests: setup
	@$(bin)/python tests/bench/guests.py

wire:
	$(bin)/python -m grpc_tools.protoc -Imigrate --python_out=migrate --pyi_out=migrate migrate/wire.proto

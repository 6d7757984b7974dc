# One name for each thing one does here; what they do is in scripts/.
#
#   make demo          two agents, a hub and a database, from nothing (KEEP=1 leaves it running)
#   make test          all set-up and all tests
#   make check         formatting and lints, as CI demands them
#   make acceptance    the real programs through a tunnel: pgbench, redis, curl, ssh, rsync, …
#   make soak          pgbench and a long transfer while the hub is killed again and again (TIME, KILLS, MIB, …)
#   make rest          the REST interface against its own document, by schemathesis (EXAMPLES=60); needs python3
#   make interop       a second implementation, in Python, against the vectors and the programs (HANDSHAKES=1000); needs python3
#   make picture       draws docs/terminal.svg from what the commands print; needs python3
#   make bench         how fast it is: the hot functions, then two agents and a hub beside direct loopback
#   make fuzz          each fuzz target for TIME=60 seconds, or RUNS=N inputs; needs nightly and cargo-fuzz
#   make model         the symbolic models of the protocol in spec/model, and their negative controls; needs verifpal
#   make audit         what we depend on: who may use what, licences, known vulnerabilities; needs cargo-deny
#   make repro         builds a commit twice, elsewhere, and compares the binaries (REV=v0.1.0, ONCE=1)
#   make build         the release binaries
#   make clean

# rustup's place, for shells that were started before it.
export PATH := $(PATH):$(HOME)/.cargo/bin

TIME ?= 60
REV ?= HEAD

.PHONY: build demo test check acceptance soak rest interop picture bench fuzz model audit repro clean

build:
	@scripts/toolchain
	cargo build --release --locked --bins

demo:
	@scripts/demo

test:
	@scripts/test

check:
	@scripts/toolchain
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings

acceptance:
	@scripts/acceptance

soak:
	@scripts/soak

rest:
	@scripts/rest

interop:
	@scripts/interop

picture:
	@scripts/picture

bench:
	@scripts/bench

fuzz:
	@scripts/fuzz $(TIME)

model:
	@scripts/model

audit:
	@scripts/audit

repro:
	@scripts/repro $(REV)

clean:
	cargo clean

# Everyday entry points; `cargo xtask --help` has the rest.
XTASK = cargo run -q -p xtask --

.DEFAULT_GOAL := help
.PHONY: help demo test bench fuzz kernel lab check deny clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## Set everything up, then run containers in microVMs under a real containerd
	@$(XTASK) demo

test: ## Set up what is missing and run every test; E2E=name runs some end-to-end tests only, CONTAINERD=1.7 or 2.x on one
	@$(XTASK) test

bench: ## Figures of ours beside runc's and QEMU's, in one run
	@$(XTASK) bench

SECONDS = 60
fuzz: ## Every fuzz target for SECONDS=60 each
	@$(XTASK) fuzz --seconds $(SECONDS)

kernel: ## Build the lean guest kernel (about 12 minutes on two processors; cached)
	@$(XTASK) kernel

lab: ## A shell in the lab: a machine with working KVM, emulated by QEMU
	@$(XTASK) lab shell

check: ## Format, lints and unit tests
	@$(XTASK) test --quick

deny: ## Licences, sources and advisories of everything we link
	@$(XTASK) deny

clean: ## Remove what was built; the cache, ~/.cache/supermachine, stays
	@$(XTASK) lab down
	@cargo clean

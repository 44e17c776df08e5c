# Everyday entry points; `cargo xtask --help` has the rest.
XTASK = cargo run -q -p xtask --

.DEFAULT_GOAL := help
.PHONY: help demo test soak bench fuzz kernel lab check check-macos test-arm64 install deny clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: ## Set everything up, then run containers in microVMs under a real containerd
	@$(XTASK) demo

test: ## Set up what is missing and run every test; E2E=name runs some end-to-end tests only, CONTAINERD=1.7 or 2.x on one
	@$(XTASK) test

soak: ## Faults, with 200 containers one after the other and containerd killed at each step (an hour and more in the lab)
	@$(XTASK) test --e2e faults:: --containerd 2.x --runs 200

test-arm64: ## Tests of arm64, cross-built, in the arm64 lab
	@$(XTASK) test-arm64

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

check-macos: ## The macOS build checked, linted and linked on Linux (the first time builds its standard library)
	@$(XTASK) check-macos

ifeq ($(shell uname -s),Darwin)
BINDIR ?= /usr/local/bin
# Where [vm] program looks, unless it says otherwise.
LIBEXECDIR ?= /usr/local/libexec

install: ## Build and install; on macOS the programs, with the VMM signed for the hypervisor
	@cargo build --release -p supermachine-shim -p supermachine-runtime
	@cargo build --release -p supermachine-vmm --bin supermachine-vmm
	@mkdir -p "$(DESTDIR)$(BINDIR)" "$(DESTDIR)$(LIBEXECDIR)"
	@# Signed under a name of its own and moved: a file that is signed where it runs is torn.
	@place() { \
		new="$$2/.$$1.new"; \
		cp "$${CARGO_TARGET_DIR:-target}/release/$$1" "$$new" && \
		codesign --force --sign - $$3 "$$new" && \
		mv -f "$$new" "$$2/$$1"; \
	}; \
	place supermachine-vmm "$(DESTDIR)$(LIBEXECDIR)" "--entitlements vmm/macos.entitlements" && \
	place supermachine "$(DESTDIR)$(BINDIR)" && \
	place containerd-shim-supermachine-v2 "$(DESTDIR)$(BINDIR)"
else
install: ## Build and install below DESTDIR; on macOS the programs, with the VMM signed for the hypervisor
	@root="$$($(XTASK) build)" && cp -a "$$root/." "$(DESTDIR)/"
endif

deny: ## Licences, sources and advisories of everything we link
	@$(XTASK) deny

clean: ## Remove what was built; the cache, ~/.cache/supermachine, stays
	@$(XTASK) lab down
	@cargo clean

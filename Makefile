# Every target sets up what it needs; scripts/with_environment says which Python it uses.
#   TORCH   what pip installs where there is no torch >= 2.11 (default: torch==2.13.0)
#   PYTHON  the interpreter that makes .venv (default: a python3 of version 3.11 or 3.12)
#   ARGS    further arguments of the command: make test ARGS='-k confidence'
export TORCH PYTHON

IN := scripts/with_environment

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench sanitize clean

help:
	@echo 'make demo      build, install, and decode problems with the tiny model'
	@echo 'make test      build, install, and run the tests'
	@echo 'make lint      formatting, lint and types'
	@echo 'make bench     build, install, and run the benchmarks'
	@echo 'make sanitize  build, install, and run GPU tests under compute-sanitizer'
	@echo 'make clean     remove what was built, .venv included'
	@echo 'Variables: TORCH, PYTHON, ARGS; the Makefile describes them.'

demo:
	@$(IN) demo python -m examples.tiny_dllm.demo $(ARGS)

# Then what runs Triton kernels once more, in Triton's interpreter; ARGS may choose none of it
# (pytest's exit status 5).
test:
	@$(IN) test python -m pytest $(ARGS)
	@TRITON_INTERPRET=1 $(IN) test python -m pytest -m triton $(ARGS) || [ $$? = 5 ]

lint:
	@$(IN) lint ruff check
	@$(IN) lint ruff format --check
	@find csrc ascend_ops -type f -regex '.*\.\(h\|cuh\|cpp\|cu\)' -print0 | xargs -0 $(IN) lint clang-format --dry-run -Werror
	@$(IN) lint mypy

bench:
	@$(IN) bench python -m bench $(ARGS)

sanitize:
	@$(IN) test scripts/sanitize $(ARGS)

clean:
	rm -rf build dist .venv *.egg-info lopa_kernels/*.so lopa_kernels/*.tmp

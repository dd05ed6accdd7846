# Most targets first set up .venv, with a Python 3.8 to 3.10 found by tools/python_env.sh. To choose one:
# make PYTHON=/path/to/python3.10 test
PYTHON ?=
python := .venv/bin/python
run := results_demo
# Python is to keep what it compiles at the first import: pip has compiled no package of .venv.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help env demo lint test test-all fuzz bench clean

help:
	@echo "make demo    create the embedded scene, train on it, render, extract and evaluate"
	@echo "make test    run the tests"
	@echo "make test-all  the slow tests, too, which take minutes"
	@echo "make lint    check the code with ruff"
	@echo "make fuzz    test the readers on thousands of damaged files (FUZZ=2000 of each kind)"
	@echo "make bench   measure the time of each part of a training step"
	@echo "make clean   remove .venv, data/demo and caches, but no results"

env:
	@bash tools/python_env.sh "$(PYTHON)"

demo: env
	$(python) make_scene.py --output data/demo
	$(python) train.py --config config/demo.yaml --monitor-path results
	$(python) synthesize.py --config $(run)/demo.yaml --model-load-path $(run) --normals
	$(python) extract.py --config $(run)/demo.yaml --model-load-path $(run)
	$(python) extract.py --config $(run)/demo.yaml --model-load-path $(run) --faces 50000 --texture 1024 \
		--highlights --upright --output $(run)/asset.glb $(run)/mesh.html
	$(python) evaluate.py --config $(run)/demo.yaml --model-load-path $(run) \
		--mesh $(run)/mesh.ply --ground-truth data/demo/surface.ply
	$(python) report.py $(run)
	@echo "Open $(run)/report.html and $(run)/mesh.html in a browser."
	@echo "Renders are in $(run)/renders; the mesh is $(run)/mesh.ply, with textures $(run)/asset.glb."

test: env
	$(python) -m pytest

test-all: env
	$(python) -m pytest -m ""

lint: env
	$(python) -m ruff check

fuzz: env
	$(python) -m pytest --hypothesis-profile many tests/test_fuzz*.py

bench: env
	$(python) bench/bench.py

clean:
	[ ! -e .venv/made-by-make ] || rm -rf .venv
	rm -rf .venv-oldest data/demo .pytest_cache .ruff_cache __pycache__ */__pycache__

# make demo and make test set up .venv first, with a Python 3.8 to 3.10 that tools/python_env.sh finds;
# make PYTHON=/path/to/python3.10 test names one.
PYTHON ?=
python := .venv/bin/python
run := results_demo

.PHONY: help env demo lint test fuzz bench clean

help:
	@echo "make demo    make the embedded scene, train on it, render, extract and evaluate"
	@echo "make test    run the tests"
	@echo "make lint    look for mistakes with ruff"
	@echo "make fuzz    feed the readers thousands of damaged files (FUZZ=2000 of each)"
	@echo "make bench   measure where the time of a training step goes"
	@echo "make clean   remove .venv, data/demo and the caches (never a result)"

env:
	@bash tools/python_env.sh "$(PYTHON)"

demo: env
	$(python) make_scene.py --output data/demo
	$(python) train.py --config config/demo.yaml --monitor-path results
	$(python) synthesize.py --config $(run)/demo.yaml --model-load-path $(run) --normals
	$(python) extract.py --config $(run)/demo.yaml --model-load-path $(run) --output $(run)/mesh.ply $(run)/mesh.html
	$(python) evaluate.py --config $(run)/demo.yaml --model-load-path $(run) \
		--mesh $(run)/mesh.ply --ground-truth data/demo/surface.ply
	$(python) report.py $(run)
	@echo "Look at $(run)/report.html in a browser, the renders in $(run)/renders, the mesh $(run)/mesh.ply and, in a browser too, $(run)/mesh.html."

test: env
	$(python) -m pytest

lint: env
	$(python) -m ruff check

fuzz: env
	$(python) -m pytest --hypothesis-profile many tests/test_fuzz*.py

bench: env
	$(python) bench/bench.py

clean:
	[ ! -e .venv/made-by-make ] || rm -rf .venv
	rm -rf .venv-oldest data/demo .pytest_cache .ruff_cache __pycache__ */__pycache__

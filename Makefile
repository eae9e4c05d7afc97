.PHONY: lint test bench notebooks
lint:
	ruff check . && ruff format --check . && pyright
test:
	pytest
bench:
	python benchmarks/run.py
notebooks:
	jupytext --to ipynb --update notebooks/0*.py
	jupyter execute --inplace notebooks/0*.ipynb

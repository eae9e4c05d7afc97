.PHONY: lint test bench tables docs notebooks
lint:
	ruff check . && ruff format --check . && pyright
test:
	pytest
bench:
	python benchmarks/run.py
tables:
	python experiments/pages.py README.md docs/*.md
docs:
	sphinx-build -W --keep-going docs site
notebooks:
	jupytext --to ipynb --update notebooks/0*.py
	jupyter execute --inplace notebooks/0*.ipynb

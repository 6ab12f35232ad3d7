"""``python -m llm_fp4`` is the command ``llm-fp4``."""

from llm_fp4.cli.main import run

if __name__ == "__main__":
    run()

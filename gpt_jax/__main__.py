"""`python -m gpt_jax <command>`, the same as `gpt-jax <command>`."""

from gpt_jax.commands.main import main

if __name__ == "__main__":
    main()

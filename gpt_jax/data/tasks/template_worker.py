"""The process that renders chat templates: a line of JSON in, a line of JSON out.

It is run as a file and imports nothing of this package, so that it starts fast and holds little.
"""

import contextlib
import functools
import json
import sys
from typing import Any

# What templates ask for and chats here do not have.
NOTHING = {"tools": None, "documents": None}
LONGEST_ERROR = 500  # characters; a template writes the messages of its own errors


def limit_memory(size: int) -> None:
    """Bounds the address space, where the system can."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (size, size))


@functools.lru_cache(4)
def compile_template(text: str):
    """The template in Jinja's sandbox, which neither reads attributes of Python nor changes
    values that it is given."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = write_json
    environment.globals["raise_exception"] = refuse
    return environment.from_string(text)


def write_json(value: Any, indent: int | None = None) -> str:
    """JSON as templates expect it, without the escapes of HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def refuse(message: str) -> None:
    """What a template calls for messages that it does not take."""
    raise ValueError(message)


def answer(asked: dict[str, Any], largest: int) -> dict[str, Any]:
    """The texts of all that is asked, or why there are none."""
    try:
        template = compile_template(asked["template"])
        texts = []
        for render in asked["renders"]:
            parts = []
            size = 0
            for part in template.generate(**NOTHING, **asked["tokens"], **render):
                parts.append(part)
                size += len(part)
                if size > largest:
                    return {"error": f"it writes more than {largest:,} characters"}
            texts.append("".join(parts))
        return {"texts": texts}
    except ImportError:
        return {"missing": True}
    except MemoryError:
        return {"error": "it takes too much memory"}
    except Exception as error:  # A template may raise anything.
        return {"error": f"{type(error).__name__}: {error}"[:LONGEST_ERROR]}


def main() -> None:
    """Answers lines until the input ends."""
    limit_memory(int(sys.argv[1]))
    largest = int(sys.argv[2])
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line), largest)), flush=True)


if __name__ == "__main__":
    main()

"""What the stand-ins do not provide: it imports, and fails on use with one sentence."""

from __future__ import annotations

from typing import Any, NoReturn


def absent_function(package: str, name: str) -> Any:
    """Returns a function that raises when called.

    Args:
        package: Name on the package index, e.g. `torch-scatter`.
        name: The function's name.

    Returns:
        A callable that takes anything and raises an ImportError naming `package`. Its docstring names the
        argument `batch_size`, because torch_geometric reads docstrings to learn which signature it may use.
    """

    def absent(*args: Any, **kwargs: Any) -> NoReturn:
        raise ImportError(_sentence(package, name))

    absent.__name__ = absent.__qualname__ = name
    absent.__doc__ = f"Placeholder of `{name}` (any arguments, batch_size included): needs {package}."
    return absent


def absent_class(package: str, name: str) -> type:
    """Returns a class that raises when it is instantiated or when an attribute of the class is used.

    It is a real class, so `isinstance` and annotations that mention it work; nothing is an instance of it.
    """

    class Meta(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> NoReturn:
            raise ImportError(_sentence(package, name))

        def __getattr__(cls, attribute: str) -> NoReturn:
            if attribute.startswith("__"):
                # Inspection (copy, pickle, typing, doctest) must see an ordinary class.
                raise AttributeError(attribute)
            raise ImportError(_sentence(package, f"{name}.{attribute}"))

    contents = {"__module__": package.replace("-", "_"), "__doc__": f"Placeholder: needs {package}."}
    return Meta(name, (), contents)


def _sentence(package: str, name: str) -> str:
    module = package.replace("-", "_")
    return f"{module}.{name} is not in fairchem_dens's stand-in for {module}: install {package} to use it."

"""Packaging: the metadata lives in settings.ini, so that nbdev and setuptools read the same facts."""
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(ROOT / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]
# Folders of the checkout that travel in the wheel, found again with importlib.resources (genre_nb.core.resource_directory).
RESOURCES = {"models": "models", "metrics": "metrics", "sample": "data/sample"}


def requirements(name: str) -> list[str]:
    return settings[name].split()


def extras() -> dict[str, list[str]]:
    own = {name: requirements(f"{name}_requirements") for name in settings["extras"].split()}
    return {name: sum((own[part] for part in [name, *settings.get(f"{name}_includes", "").split()]), []) for name in own}


def long_description() -> str:
    "The README; where it names a file of the checkout, a page elsewhere needs the whole address."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"\]\((?!https?:|#)", f"]({settings['git_url']}/raw/{settings['branch']}/", text)


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    project_urls={"Documentation": settings["doc_host"] + settings["doc_baseurl"], "Source": settings["git_url"]},
    license_expression="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    keywords=settings["keywords"].split(),
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Environment :: Web Environment",
        "Intended Audience :: Developers",
        "Intended Audience :: Education",
        "Natural Language :: English",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: {number}" for number in settings["tried_pythons"].split()),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Text Processing :: Linguistic",
        "Typing :: Typed",
    ],
    python_requires=f">={settings['min_python']}",
    packages=["genre_nb", "genre_nb.resources", *(f"genre_nb.resources.{name}" for name in RESOURCES)],
    package_dir={"genre_nb": "genre_nb", **{f"genre_nb.resources.{name}": folder for name, folder in RESOURCES.items()}},
    package_data={"genre_nb": ["py.typed"], **{f"genre_nb.resources.{name}": ["*", "*/*"] for name in RESOURCES}},
    exclude_package_data={"": ["__pycache__/*", "*.pyc", "*.part", ".*"]},
    install_requires=requirements("requirements"),
    extras_require=extras(),
    entry_points={"console_scripts": settings["console_scripts"].split()},
    zip_safe=False,
)

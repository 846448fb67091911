"""The language of a surname: the name lists of the package `faker`, which come from official statistics."""

from collections import Counter
from collections.abc import Iterator
from importlib import import_module

from lightning_drm.data.quickstart.part_of_speech import first_by_hash
from lightning_drm.data.quickstart.similar import word_family

PACKAGE = "faker"
LOCALES = {
    "de_DE": "German",
    "en_US": "English",
    "es_ES": "Spanish",
    "fi_FI": "Finnish",
    "fr_FR": "French",
    "hr_HR": "Croatian",
    "it_IT": "Italian",
    "nl_NL": "Dutch",
}
"""Those with a few hundred surnames or more."""

NUM_PER_CLASS = 300


def read() -> Iterator[dict[str, str]]:
    """Yield the surnames of one language only; names that begin alike share a group."""
    surnames = {
        locale: set(import_module(f"faker.providers.person.{locale}").Provider.last_names) for locale in LOCALES
    }
    num_languages = Counter(name for names in surnames.values() for name in names)
    for locale, language in LOCALES.items():
        own = (name for name in surnames[locale] if num_languages[name] == 1)
        for name in first_by_hash(own, NUM_PER_CLASS):
            yield {"text": name, "label": language, "group": word_family(name.lower())}

"""Any string whatsoever goes through language, text and preprocessing: no exception, and every place is in the text."""
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genre_nb.language import LANGUAGE_NAMES, identify_languages
from genre_nb.preprocessing import Preprocessor, reference_recipe
from genre_nb.text import clean, normalize_word, repair_mojibake, stem, tokenize

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=300)  # lone surrogates included
TROUBLE = st.text("aB1.,'’-_<>&;:/ \n\r\t\0\u0301\u00ad\u200dčŕĺňİßﬁﷺ한が😀\ud800", max_size=200)
TEXTS = ANY_TEXT | TROUBLE
PREPROCESSORS = [Preprocessor(), Preprocessor(stem="snowball", keep_negations=True),
                 Preprocessor(stem=None, lowercase=False, fold_accents=False),
                 Preprocessor(stem=None, remove_stop_words=False, repair=False, minimum_length=1)]


@given(TEXTS)
@settings(max_examples=500, deadline=None)
def test_tokens_are_places_in_the_raw_text(text):
    tokens = tokenize(text)
    assert all(text[token.start:token.end] == token.text != "" for token in tokens)
    assert all(one.end <= two.start for one, two in zip(tokens, tokens[1:]))


@given(TEXTS)
@settings(max_examples=500, deadline=None)
def test_repairing_moves_nothing_and_cleaning_is_done_once(text):
    assert len(repair_mojibake(text)) == len(text)
    assert repair_mojibake(repair_mojibake(text)) == repair_mojibake(text)
    assert clean(clean(text)) == clean(text)


@pytest.mark.parametrize("preprocessor", PREPROCESSORS, ids=repr)
@given(text=TEXTS)
@settings(max_examples=300, deadline=None)
def test_both_ways_of_the_preprocessor_agree(preprocessor, text):
    words, tokens = preprocessor(text), preprocessor.tokens(text)
    assert [token.text for token in tokens] == words == preprocessor(text)
    assert preprocessor.process(text).split() == words
    assert all(0 <= token.start < token.end <= len(text) for token in tokens)


@given(st.lists(TEXTS, max_size=10))
@settings(max_examples=200, deadline=None)
def test_every_text_has_a_language(texts):
    languages = identify_languages(texts)
    assert languages == identify_languages(texts) and len(languages) == len(texts)
    assert all(language.code in LANGUAGE_NAMES and 0 <= language.confidence <= 1 for language in languages)


@given(TEXTS)
@settings(max_examples=300, deadline=None)
def test_words_of_any_kind_are_normalised_and_stemmed(text):
    assert isinstance(stem(normalize_word(text)), str)
    for token in tokenize(text):
        word = normalize_word(token.text)
        assert isinstance(stem(word), str) and not any(character.isspace() for character in word)
    assert isinstance(reference_recipe(text), str)

"""The index's sentences as words: what a label is made of.

1. Tokens are joined to text, and the text is cut into words: a word, a number with its sign, a bracketed remark, or
   one mark of punctuation. Each token belongs to the word that holds its last character, white space to the next word.
2. Words are known by three numbers: their `form` (case-folded), their `family` (forms that differ by an inflection,
   such as protect, protects, protecting, if the plain form occurs too), and their `surface` (as written).
3. Every form has `classes` it belongs to: years, months, articles, words in -ing. Lists and patterns are below.

Sentences are parted by `MARGIN` boundary words, so that neighbours of a word never belong to another sentence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int64

from monosemy.latents.index import Index

MARGIN = 3
"""Boundary words between two sentences: how far a phrase looks back."""
BOUNDARY = 0
"""Form and family of a boundary word."""

WORD = re.compile(
    r"\[[^\]\s]{1,30}\]"  # [Laughter]
    r"|(?:[^\W\d_]\.){2,}"  # U.S., p.m.
    r"|\$?\d+(?:,\d{3})*(?:\.\d+)?(?:%|[^\W\d_]+)?"  # $3.5, 21st, 1990s, 40%
    r"|[^\W\d_]+(?:['’‑-][^\W\d_]+)*"  # words, also with hyphen or apostrophe
    r"|-{2,}|[^\w\s]|_"
)

FUNCTION_WORDS = {
    "articles": "a an the",
    "demonstratives": "this that these those such",
    "first-person pronouns": "i me my mine myself we us our ours ourselves",
    "second-person pronouns": "you your yours yourself yourselves",
    "third-person pronouns": "he him his himself she her hers herself it its itself they them their theirs themselves",
    "prepositions": "of in to for with on at from by about into through during against among between under over within "
    "without toward towards upon across behind beyond near since until before after above below throughout",
    "conjunctions": "and or but nor so yet because although though while if unless whether as than when where",
    "auxiliary verbs": "is am are was were be been being has have had having do does did i'm we're it's that's i've "
    "we've they're there's",
    "modal verbs": "will would shall should can could may might must cannot i'll we'll you'll they'll let's let",
    "negations": "not no never none nothing neither don't can't won't cannot isn't didn't doesn't aren't wasn't",
    "question words": "who what which whom whose why how when where",
    "quantity words": "all every each some any many much more most few less least several both another other others "
    "only even also too very just again here there now then still up out off down",
}
CONTENT_WORDS = {
    "months": "january february march april may june july august september october november december",
    "weekdays": "monday tuesday wednesday thursday friday saturday sunday",
    "number words": "one two three four five six seven eight nine ten eleven twelve fifteen twenty thirty forty fifty "
    "sixty seventy eighty ninety hundred hundreds thousand thousands million millions billion billions trillion dozen "
    "half quarter third thirds double",
    "ordinals": "first second third fourth fifth sixth seventh eighth ninth tenth 1st 2d 2nd 3d 3rd 4th 5th",
    "units of time": "day days week weeks month months year years decade decades century centuries hour hours minute "
    "minutes moment generation generations era",
    "countries and regions": "america britain england france germany russia china japan india israel iraq iran "
    "afghanistan pakistan vietnam korea cuba mexico canada poland ukraine egypt syria europe asia africa greece turkey "
    "kuwait bosnia kosovo nicaragua panama spain italy haiti lebanon berlin moscow baghdad hungary laos cambodia "
    "salvador colombia ireland australia taiwan rome atlantic pacific",
    "nationalities": "american americans british english french german germans russian russians chinese japanese "
    "indian israeli iraqi iraqis iranian afghan vietnamese korean cuban mexican european europeans asian african "
    "soviet soviets arab arabs palestinian palestinians ukrainian",
    "family words": "mother mothers father fathers parent parents child children son sons daughter daughters brother "
    "brothers sister sisters family families husband wife wives grandparents",
}
PATTERNS = {
    "years": r"(1[5-9]|20)\d\d",
    "decades": r"(1[5-9]|20)?\d0['’]?s",
    "dollar amounts": r"\$.*",
    "percentages": r"\d.*%",
    "numbers": r"\$?\d.*",
    "numerals with ordinal endings": r"\d+(st|nd|rd|th|d)",
    "audience reactions": r"\[.*\]",
    "hyphenated words": r"\w+-\w.*",
    "contractions": r"\w+['’](ll|m|re|ve|d|t)",
    "possessives": r"\w+['’]s",
    "words in -ing": r"\w{2,}ing",
    "words in -tion": r"\w{2,}[st]ions?",
    "words in -ly": r"\w{2,}ly",
    "words in -ed": r"\w{2,}ed",
    "words in -ment": r"\w{2,}ments?",
    "words in -ity": r"\w{2,}it(y|ies)",
    "words in -ism or -ist": r"\w{2,}is(m|ts?)",
    "words in -ness": r"\w{2,}ness",
    "words in -able": r"\w{2,}[ai]ble",
    "words in -ize": r"\w{2,}[iy][sz](e|es|ed|ing)",
    "words with un-": r"un(?!i|der)\w{3,}",
    "words with re-": r"re-?\w{4,}",
    "words with dis-": r"dis\w{3,}",
    "words with inter-": r"inter\w{3,}",
    "words with over-": r"over\w{3,}",
    "punctuation marks": r"[^\w\s$]+",
}
MARKS = {
    ",": "commas", ".": "full stops", "?": "question marks", "!": "exclamation marks", ";": "semicolons",
    ":": "colons", "--": "dashes", "-": "hyphens", "—": "dashes", "–": "dashes", '"': "quotation marks",
    "“": "opening quotation marks", "”": "closing quotation marks", "'": "apostrophes", "’": "apostrophes",
    "(": "opening brackets", ")": "closing brackets", "$": "dollar signs", "[": "opening brackets",
    "]": "closing brackets", "%": "percent signs", "&": "ampersands", "/": "slashes", "*": "asterisks",
}  # fmt: skip
CAPITALIZED, ACRONYMS = "capitalised names", "acronyms"
CLASSES = (*FUNCTION_WORDS, *CONTENT_WORDS, *PATTERNS, CAPITALIZED, ACRONYMS)
GENERIC = frozenset(" ".join(FUNCTION_WORDS.values()).split())
"""Words that say little about a subject."""

INFLECTIONS = (
    ("'s", ("",)), ("’s", ("",)), ("ies", ("y",)), ("ied", ("y",)), ("es", ("", "e")), ("s", ("",)),
    ("ing", ("", "e")), ("ed", ("", "e")),
)  # fmt: skip
IRREGULAR = (
    "take took taken taking", "make made making", "give gave given giving", "go goes went gone going",
    "come came coming", "get got gotten getting", "see saw seen", "know knew known", "think thought",
    "say said", "tell told", "find found", "keep kept", "leave left", "bring brought", "begin began begun beginning",
    "build built", "buy bought", "send sent", "spend spent", "stand stood", "lose lost", "pay paid", "meet met",
    "hold held", "write wrote written writing", "speak spoke spoken", "break broke broken", "choose chose chosen",
    "grow grew grown", "rise rose risen rising", "fall fell fallen", "win won winning", "fight fought", "teach taught",
    "seek sought", "become became", "lead led", "feel felt", "sell sold", "draw drew drawn", "drive drove driven",
    "man men", "woman women", "child children", "person people", "life lives", "good better best", "bad worse worst",
)  # fmt: skip


class Lexicon:
    """All sentences of an index as words. Boundary words have form 0."""

    def __init__(self, index: Index) -> None:
        table = index.sentences
        texts, ends = _texts(index)
        self.forms: list[str] = [""]
        self.surfaces: list[str] = [""]
        form_of, surface_of = {"": BOUNDARY}, {"": 0}
        form, surface, sentence = [BOUNDARY] * MARGIN, [0] * MARGIN, [-1] * MARGIN
        self.word_of_token = np.full(len(table.ids), -1)
        """Number of the word each token belongs to, -1 for white space at the end."""
        for number, text in enumerate(texts):
            first, word_ends, word_starts = len(form), [], []
            for match in WORD.finditer(text):
                written = match.group()
                word_starts.append(match.start())
                word_ends.append(match.end())
                folded = written.lower()
                form.append(form_of.setdefault(folded, len(form_of)))
                surface.append(surface_of.setdefault(written, len(surface_of)))
                sentence.append(number)
            start, stop = table.starts[number], table.starts[number + 1]
            self.word_of_token[start:stop] = _words_of(ends[start:stop], word_starts, word_ends, first)
            form += [BOUNDARY] * MARGIN
            surface += [0] * MARGIN
            sentence += [-1] * MARGIN
        self.forms, self.surfaces = list(form_of), list(surface_of)
        self.form, self.surface, self.sentence = np.array(form), np.array(surface), np.array(sentence)
        self.pieces, self.piece_of_token = _pieces(index)
        """Tokens as text, without the space before, case-folded; and which of them each token is."""
        self.family_of_form = _families(self.forms, np.bincount(self.form, minlength=len(self.forms)))
        self.family = self.family_of_form[self.form]
        generic = np.array([text in GENERIC or not text[:1].isalpha() for text in self.forms])
        self.generic_form: Bool[np.ndarray, " form"] = generic
        real = self.sentence >= 0
        self.background: Bool[np.ndarray, " word"] = real & table.background[np.where(real, self.sentence, 0)]
        self.n_background = int(self.background.sum())
        self.starts = np.searchsorted(np.where(real, self.sentence, -1)[real], np.arange(len(texts) + 1))
        self.real_words: Int64[np.ndarray, " word"] = real.nonzero()[0]

    @cached_property
    def classes(self) -> Bool[np.ndarray, "word class_name"]:
        """Which of `CLASSES` each word belongs to."""
        by_form = np.zeros((len(self.forms), len(CLASSES)), bool)
        numbers = {name: number for number, name in enumerate(CLASSES)}
        for name, words in (FUNCTION_WORDS | CONTENT_WORDS).items():
            by_form[:, numbers[name]] = np.isin(self.forms, words.split())
        for name, pattern in PATTERNS.items():
            by_form[:, numbers[name]] = [re.fullmatch(pattern, text) is not None for text in self.forms]
        classes = by_form[self.form]
        inside = np.roll(self.form, 1) != BOUNDARY
        capital = np.array([text[:1].isupper() and text != "I" and not text.startswith("I'") for text in self.surfaces])
        acronym = np.array([len(text) > 1 and text.isupper() and text.isalpha() for text in self.surfaces])
        classes[:, numbers[CAPITALIZED]] = capital[self.surface] & inside
        classes[:, numbers[ACRONYMS]] = acronym[self.surface]
        return classes

    def words_of_sentence(self, sentence: int) -> Int64[np.ndarray, " word"]:
        """The words of the sentence in row `sentence` of the index's table."""
        return self.real_words[self.starts[sentence] : self.starts[sentence + 1]]


def _texts(index: Index) -> tuple[list[str], Int64[np.ndarray, " token"]]:
    """Every sentence's text, and where in it each token ends."""
    table = index.sentences
    whole: list[str | None] = [_decode(piece) for piece in index.token_bytes]
    texts, ends = [], np.empty(len(table.ids), np.int64)
    for start, stop in zip(table.starts[:-1].tolist(), table.starts[1:].tolist(), strict=True):
        ids = table.ids[start:stop].tolist()
        pieces: Sequence[str | None] = [whole[token] for token in ids]
        if None in pieces:  # a character is split over tokens
            pieces = index.pieces(ids)
        texts.append("".join(pieces))  # type: ignore[arg-type]
        ends[start:stop] = np.cumsum([len(piece) for piece in pieces if piece is not None])
    return texts, ends


def _pieces(index: Index) -> tuple[list[str], Int64[np.ndarray, " token"]]:
    """The distinct folded texts of tokens, and the number of the one each token of the sentences has."""
    number: dict[str, int] = {}
    folded = [piece.decode(errors="replace").strip().lower() for piece in index.token_bytes]
    of_vocabulary = np.array([number.setdefault(text, len(number)) for text in folded])
    return list(number), of_vocabulary[index.sentences.ids]


def _decode(piece: bytes) -> str | None:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


def _words_of(
    token_ends: Int64[np.ndarray, " token"], starts: list[int], ends: list[int], first: int
) -> Int64[np.ndarray, " token"]:
    """The word that holds each token's last character, else the one after it, numbered from `first`; -1 if there is
    none. White space is a token of its own before a digit: a latent that fires there speaks of the number."""
    if not starts:
        return np.full(len(token_ends), -1)
    following = np.searchsorted(starts, token_ends - 1, side="right")
    word = following - 1
    inside = (word >= 0) & (np.array(ends)[word] > token_ends - 1)
    return np.where(inside, word + first, np.where(following < len(starts), following + first, -1))


def _families(forms: list[str], counts: Int64[np.ndarray, " form"]) -> Int64[np.ndarray, " form"]:
    """For each form the form it is an inflection of; itself if it is none."""
    number = {text: form for form, text in enumerate(forms)}
    family = np.arange(len(forms))
    for group in IRREGULAR:
        known = [number[text] for text in group.split() if text in number]
        family[known] = known[0] if known else 0
    for form, text in enumerate(forms):
        if family[form] != form:
            continue
        for ending, replacements in INFLECTIONS:
            stem = text.removesuffix(ending)
            if stem == text or len(stem) < 3 or (ending == "s" and stem.endswith(("s", "u", "i"))):
                continue
            doubled = (stem[:-1],) if ending in ("ing", "ed") and stem[-1] == stem[-2] else ()
            plain = [stem + replacement for replacement in replacements] + list(doubled)
            found = [number[candidate] for candidate in plain if candidate in number and candidate not in GENERIC]
            if found:
                family[form] = max(found, key=lambda candidate: counts[candidate])
                break
    while (family[family] != family).any():  # meetings -> meeting -> meet
        family = family[family]
    return family

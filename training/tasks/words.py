"""Word lists of the generated tasks.

Each word is one token of the tokenizer wherever it stands (see `training.tokenizer`): capitalised
words are tokens without a space, lower-case words are tokens with the space before them. So a copied word
is the same token in the request and in the answer.
"""


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


NAMES = _split(
    """
    Alice Bob Carol David Emma Frank Grace Henry Irene Jack Karen Leo Maria Nora Oscar Paul Quinn Rosa
    Sam Tina Ursula Victor Wendy Xavier Yara Zoe Adam Bella Carl Diana Eric Fiona George Hanna Ivan
    Julia Kevin Laura Martin Nina Omar Petra Robert Sofia Tom Vera Walter Ella
    """
)
SURNAMES = _split(
    """
    Adler Brown Clark Davis Evans Fischer Green Hill Ito Jones King Lopez Moore Novak Olsen Park Reed
    Smith Turner Vogel Weber Young Ziegler Costa
    """
)
CITIES = _split(
    """
    Paris London Berlin Madrid Rome Vienna Oslo Lisbon Athens Dublin Prague Warsaw Tokyo Delhi Cairo
    Lima Boston Denver Austin Seattle Toronto Sydney Geneva Milan
    """
)
TEAMS = _split("Sales Finance Support Design Research Legal Security Marketing Logistics Quality")
LANGUAGES = _split("French German Spanish Italian Polish Dutch Greek Arabic Hindi Korean")
CODENAMES = _split(
    """
    Alpha Beta Gamma Delta Epsilon Zeta Omega Sigma Kappa Lambda Orion Vega Atlas Nova Titan Apollo
    """
)
ITEMS = _split(
    """
    apple basket candle drum engine feather guitar hammer island jacket kettle lamp mirror needle
    orange pencil quilt ribbon saddle table umbrella violin window yarn zipper anchor bottle carpet
    door flower garden helmet kite ladder magnet notebook pillow rope shovel ticket
    """
)
ANIMALS = _split("cat dog fox owl horse rabbit turtle parrot goat mouse")
TOPICS = _split("budget schedule contract website report training survey product hiring travel")
DAYS = _split("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _split(
    """
    January February March April May June July August September October November December
    """
)
VERBS = _split("scale adjust convert update compute shift change fix map tune")
NOUNS = _split("price score weight speed level count total value rate size")

"""Words that fill the templates in prompts.py. Written for this project."""

TOPICS = """
solar energy|wind turbines|electric cars|recycling at home|composting|coral reefs|rainforests|volcanoes|
earthquakes|tornadoes|the water cycle|clouds|the seasons|the moon|eclipses|black holes|comets|
the planet Mars|the Milky Way|gravity|magnetism|static electricity|sound waves|light and colour|atoms|
chemical reactions|acids and bases|the periodic table|DNA|bacteria|viruses|vaccines|the immune system|
the human heart|the brain|sleep|memory|muscles|bones|digestion|vitamins|protein|hydration|
healthy snacks|meal planning|baking bread|making soup|cooking rice|roasting vegetables|homemade pizza|
tea|coffee|chocolate|cheese|spices|growing tomatoes|herb gardens|house plants|pruning roses|lawn care|
beekeeping|butterflies|ants|spiders|owls|penguins|whales|dolphins|sharks|octopuses|elephants|lions|
wolves|horses|dogs|cats|training a puppy|goldfish|parrots|dinosaurs|fossils|the ice age|ancient Egypt|
the Roman Empire|ancient Greece|the Vikings|medieval castles|the Silk Road|the printing press|
the Renaissance|the Industrial Revolution|the French Revolution|the space race|the Great Wall of China|
the pyramids|the Titanic|famous inventors|Marie Curie|Isaac Newton|Leonardo da Vinci|Ada Lovelace|
Shakespeare|poetry|short stories|novels|science fiction|fairy tales|folk songs|jazz|classical music|
learning the guitar|learning the piano|singing|drawing|watercolour painting|photography|sculpture|
pottery|knitting|sewing|woodworking|origami|chess|card games|board games|crosswords|football|basketball|
tennis|swimming|running a marathon|cycling|yoga|stretching|weight training|hiking|camping|rock climbing|
skiing|fishing|sailing|surfing|travelling by train|travelling on a budget|packing a suitcase|Paris|
Tokyo|New York|Rome|London|Cairo|Sydney|national parks|beaches|mountains|deserts|rivers|islands|maps|
time zones|languages|learning Spanish|grammar|public speaking|writing an essay|taking notes|
studying for exams|time management|procrastination|setting goals|building habits|meditation|stress|
anxiety before a test|gratitude|friendship|making new friends|family traditions|parenting a toddler|
teenagers and phones|bedtime routines|birthday parties|weddings|holiday gifts|moving house|
cleaning the kitchen|organising a closet|home repairs|painting a room|saving water|saving electricity|
budgeting|saving money|credit cards|compound interest|taxes|investing|insurance|buying a house|
renting a flat|job interviews|writing a CV|cover letters|working from home|team meetings|
giving feedback|leadership|negotiation|customer service|marketing|starting a small business|
a lemonade stand|a book club|volunteering|charity|democracy|elections|the law|human rights|newspapers|
advertising|social media|online privacy|passwords|phishing e-mails|computer viruses|search engines|
e-mail|spreadsheets|databases|cloud computing|programming|Python|JavaScript|HTML|algorithms|sorting|
recursion|binary numbers|encryption|artificial intelligence|machine learning|neural networks|chatbots|
robots|drones|3D printing|smartphones|batteries|bridges|skyscrapers|aeroplanes|ships|trains|bicycles|
traffic|fractions|percentages|prime numbers|geometry|triangles|probability|statistics|averages|algebra|
equations|logic puzzles|riddles|ethics|happiness|justice|free will|creativity|curiosity|failure|
patience|courage|kindness|honesty|teamwork
"""
"""Topics, separated by bars."""

ABOUT_TOPIC = (
    "What is {t}?",
    "Explain {t} to a ten-year-old.",
    "Explain {t} in simple terms.",
    "Tell me something interesting about {t}.",
    "Give me five facts about {t}.",
    "Write a short paragraph about {t}.",
    "Write a poem about {t}.",
    "Write a haiku about {t}.",
    "Write a short story about {t}.",
    "What should a beginner know about {t}?",
    "What are common mistakes people make with {t}?",
    "What are common misconceptions about {t}?",
    "Why is {t} important?",
    "How has {t} changed over time?",
    "Give me three tips about {t}.",
    "List the pros and cons of {t}.",
    "I want to learn more about {t}. Where should I start?",
    "I have a presentation about {t} tomorrow. Help me outline it.",
    "Write an introduction for an essay about {t}.",
    "Write a conclusion for an essay about {t}.",
    "Suggest a catchy title for a blog post about {t}.",
    "Write a blog post about {t}.",
    "Write a tweet about {t}.",
    "Write a quiz with four questions about {t}, with answers.",
    "Make a list of ten words related to {t}.",
    "Write a dialogue between two friends about {t}.",
    "Write a joke about {t}.",
    "Can you recommend a book about {t}?",
    "Describe {t} in one sentence.",
    "Describe {t} to someone who has never heard of it.",
    "What questions could I ask an expert on {t}?",
    "Plan a one-hour lesson on {t}.",
    "Make a table of terms used in {t} and their meanings.",
    "How does {t} affect everyday life?",
    "What is the history of {t}?",
    "What is the future of {t}?",
    "Give an example of {t} in daily life.",
    "Write a letter to a friend about {t}.",
    "Write an advertisement about {t}.",
    "Write a speech about {t}.",
    "my teacher asked us to write about {t}, any ideas?",
    "help me understand {t}",
    "{t}: what do I need to know?",
    "Is it hard to learn about {t}?",
    "Summarise what is known about {t} in three bullet points.",
    "Give me a metaphor for {t}.",
    "What would the world be like without {t}?",
    "Argue for and against {t}.",
    "Create a step-by-step guide about {t}.",
    "Who should care about {t}, and why?",
)

ABOUT_TWO = (
    "What is the difference between {t} and {u}?",
    "Compare {t} and {u}.",
    "What do {t} and {u} have in common?",
    "Write a story in which both {t} and {u} play a part.",
    "Which is more interesting, {t} or {u}? Give your reasons.",
    "Write a short dialogue in which someone changes the subject from {t} to {u}.",
    "Think of a project that combines {t} and {u}.",
)

HEROES = """
a lonely lighthouse keeper|a clever fox|a young inventor|an old sailor|a shy robot|a lost puppy|
a brave princess|a retired teacher|a talking tree|a tired detective|twin sisters|
a dragon who is afraid of fire|a baker|a time traveller|a ghost|a taxi driver|an astronaut|a librarian|
a street musician|a gardener|a wizard's apprentice|a nurse|a chess champion|a snowman
"""
PLACES = """
in a small village|on the moon|in an old castle|at the bottom of the sea|in a busy city|on a train|
in a forest at night|on a desert island|in a library|in a school|on a mountain|in a bakery|
at the airport|in a haunted house|on a farm|in the year 2150
"""
EVENTS = """
finds a mysterious letter|loses something precious|makes an unlikely friend|has to solve a riddle|
learns an important lesson|gets lost|discovers a hidden door|wins a contest|
must choose between two paths|meets an old enemy|finds a map|breaks a promise|learns to fly|
saves the day|tells a lie|hears a strange sound|bakes a cake|plants a seed|misses the last bus|
receives a gift
"""
STORIES = (
    "Write a short story about {hero} who {event} {place}.",
    "Write the first paragraph of a story: {hero} {event} {place}.",
    "Tell me a bedtime story about {hero} {place}.",
    "Describe {hero} {place}.",
    "Write a poem in which {hero} {event}.",
    "{hero} {event} {place}. What happens next?",
)

PEOPLE = """
my boss|my landlord|a customer|my teacher|my neighbour|a colleague|a friend|my grandmother|a hotel|my bank|
the city council
"""
MATTERS = """
asking for a day off|saying thank you|complaining about noise|asking for a refund|
apologising for being late|inviting them to a party|asking for advice|reporting a broken window|
cancelling a meeting|asking for a deadline to be moved|asking for a recommendation|congratulating them|
declining an invitation|asking about opening hours|confirming an appointment|introducing myself
"""
LETTERS = (
    "Write an e-mail to {who} {matter}.",
    "Write a short, friendly message to {who} {matter}.",
    "Write a formal letter to {who} {matter}.",
    "How should I begin an e-mail to {who} {matter}?",
)

CODE_TASKS = """
reverses a string|checks whether a number is prime|computes the factorial of a number|
counts the vowels in a text|sorts a list of numbers|finds the largest item of a list|
removes duplicates from a list|computes the Fibonacci numbers|checks whether a word is a palindrome|
converts Celsius to Fahrenheit|merges two dictionaries|reads a file and counts its lines|
computes the average of a list|finds the common elements of two lists|flattens a nested list|
counts how often each word occurs|generates a random password|validates an e-mail address|
rolls two dice|converts a number to binary|finds the second largest number|draws a triangle of stars|
computes the greatest common divisor|groups words by their first letter|prints the multiplication table|
swaps two variables|checks whether two words are anagrams|splits a list into chunks|
computes the sum of digits|parses a CSV line
"""
CODE = (
    "Write a Python function that {task}.",
    "Write a JavaScript function that {task}.",
    "Write a function that {task}, with comments.",
    "Write a Python function that {task}, and explain how it works.",
    "How would you write a program that {task}?",
    "Write a test for a Python function that {task}.",
)

NAMES = """
Anna|Ben|Carlos|Dina|Emre|Fatima|George|Hana|Ivan|Julia|Kofi|Lena|Marco|Nadia|Omar|Priya|Quinn|Rosa|Sam|Tara
"""
THINGS = "apples|books|marbles|stamps|coins|pencils|cookies|tickets|balloons|stickers|oranges|cards"
SUMS = (
    "{name} has {a} {thing} and gives {b} of them to {other}. How many does {name} have left?",
    "{name} buys {b} {thing} for {c} dollars each. How much does {name} pay?",
    "{name} has {a} {thing} and {other} has {b} more than that. How many do they have together?",
    "A train goes {a} kilometres in {c} hours. How fast is it?",
    "What is {a} plus {b}?",
    "What is {a} minus {b}?",
    "What is {c} times {b}? Explain your steps.",
    "What is {b} percent of {a}?",
    "{name} reads {c} pages a day. How long does a book of {a} pages take?",
    "A recipe for {c} people needs {b} grams of flour. How much is needed for {a} people?",
)

SMALL_TALK = """
Hi!|Hello, how are you?|Good morning!|What can you do?|Who are you?|What is your name?|Who made you?|
Are you a human?|Tell me a joke.|I'm bored.|I'm feeling sad today.|I had a great day!|
What should I have for dinner?|Can you help me?|Thanks for your help!|Tell me a story.|
What's your favourite colour?|Sing me a song.|Do you dream?|I can't sleep.|Good night!|Surprise me.|
Let's play a game.|I need advice.|Ask me a question.|How do I cheer up a friend?|It's raining again.|
I got the job!|I failed my exam.|What day is it today?
"""

ON_PASSAGE = (
    "Summarise the following text in one sentence:\n\n{p}",
    "Summarise this:\n\n{p}",
    "What is the main point of this text?\n\n{p}",
    "Rewrite the following so that a beginner understands it:\n\n{p}",
    "Explain this text in simple words:\n\n{p}",
    "{p}\n\nWhat does this mean?",
    "Turn the following text into bullet points:\n\n{p}",
    "Write a title for this text:\n\n{p}",
    "Ask three questions about the following text:\n\n{p}",
    "Rewrite this in a friendly tone:\n\n{p}",
    "List the keywords of this text:\n\n{p}",
    "Repeat the following text word for word:\n\n{p}",
    "Correct any mistakes in this text:\n\n{p}",
    "Continue this text:\n\n{p}",
)

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a concise assistant. Answer in one or two sentences.",
    "You are a friendly teacher who explains things step by step.",
    "You are an experienced software engineer.",
    "You answer in bullet points.",
    "You are a creative writer.",
)

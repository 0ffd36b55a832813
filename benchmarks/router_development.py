"""Prompts to choose a router on, none of which is reported: 26 other tasks, each asked in six ways.

The contents are made here. Distant tasks are those of reasoning-gym that the report does not use.
"""

import random
from collections.abc import Callable, Mapping, Sequence

import router_prompts

_WORDS = (
    "river", "candle", "yellow", "market", "stone", "window", "guitar", "forest", "letter", "summer",
    "pencil", "bridge", "garden", "silver", "planet", "orange", "hammer", "island", "kitchen",
    "monkey", "basket", "winter", "dragon", "mirror", "pocket", "rabbit", "thunder", "velvet",
)  # fmt: skip
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def _numbers(r: random.Random, low: int = 1, high: int = 99) -> str:
    return ", ".join(str(r.randint(low, high)) for _ in range(r.randint(4, 7)))


def _words(r: random.Random) -> str:
    return ", ".join(r.sample(_WORDS, r.randint(3, 6)))


def _phrase(r: random.Random) -> str:
    return " ".join(r.sample(_WORDS, r.randint(3, 6)))


def _matrix(r: random.Random) -> str:
    n = r.randint(2, 4)
    return "\n".join(" ".join(str(r.randint(0, 9)) for _ in range(n)) for _ in range(n))


def _polynomial(r: random.Random) -> str:
    return f"{r.randint(2, 9)}*x**{r.randint(2, 5)} {r.choice('+-')} {r.randint(1, 9)}*x"


def _roman(n: int) -> str:
    steps = (
        (100, "C"),
        (90, "XC"),
        (50, "L"),
        (40, "XL"),
        (10, "X"),
        (9, "IX"),
        (5, "V"),
        (4, "IV"),
    )
    text = ""
    for value, letters in (*steps, (1, "I")):
        text += letters * (n // value)
        n %= value
    return text


Fields = Callable[[random.Random], Sequence[object]]
TASKS: Mapping[str, tuple[Fields, tuple[str, str, str, str, str, str]]] = {
    "decimals": (
        lambda r: (round(r.uniform(1, 50), 2), round(r.uniform(1, 50), 2)),
        (
            "What is {0} + {1}?",
            "Add the decimals {0} and {1}.",
            "Give the sum of {0} and {1}",
            "{0} plus {1} equals what?",
            "I paid {0} and then {1}. How much was it altogether?",
            "Put {0} on top of {1} and tell me the total.",
        ),
    ),
    "division": (
        lambda r: (r.randint(50, 900), r.randint(3, 19)),
        (
            "Divide {0} by {1}, with remainder.",
            "What are quotient and remainder of {0} / {1}?",
            "Compute {0} ÷ {1} as a whole number and a rest.",
            "How many times does {1} fit into {0}, and what is left?",
            "Deal {0} cards to {1} players. How many does each get and how many stay?",
            "Carry out the long division {0} : {1}",
        ),
    ),
    "percent": (
        lambda r: (r.randint(2, 95), r.randint(20, 900)),
        (
            "What is {0}% of {1}?",
            "Calculate {0} percent of {1}.",
            "Find {0}% of the number {1}",
            "How much is {0} per cent from {1}?",
            "A coat costs {1}. The shop takes {0}% off: how large is the discount?",
            "Of {1} people {0} in a hundred said yes. How many is that?",
        ),
    ),
    "mean": (
        lambda r: (_numbers(r),),
        (
            "What is the average of {0}?",
            "Calculate the mean of these numbers: {0}",
            "Find the arithmetic mean of {0}.",
            "Average the values {0}",
            "If {0} were all made equal without changing their total, what would each be?",
            "My marks are {0}. What do I get on average?",
        ),
    ),
    "median": (
        lambda r: (_numbers(r),),
        (
            "What is the median of {0}?",
            "Find the middle value of {0}.",
            "Determine the median for the list {0}",
            "Which number is in the centre when {0} are in order?",
            "Half of {0} lie below which value?",
            "Give me the 50th percentile of {0}",
        ),
    ),
    "maximum": (
        lambda r: (_numbers(r),),
        (
            "Which is the largest of {0}?",
            "Find the maximum of {0}.",
            "What is the biggest number in the list {0}?",
            "Pick the highest value out of {0}",
            "None of {0} exceeds which one of them?",
            "Who wins if {0} are points?",
        ),
    ),
    "digit_sum": (
        lambda r: (r.randint(1000, 9999999),),
        (
            "Add up the digits of {0}.",
            "What is the digit sum of {0}?",
            "Sum all digits in the number {0}",
            "Compute the cross sum of {0}.",
            "Take {0} apart into single figures: what is their total?",
            "If every figure of {0} were a coin, how much money would it be?",
        ),
    ),
    "root": (
        lambda r: (r.randint(2, 40) ** 2,),
        (
            "What is the square root of {0}?",
            "Compute sqrt({0}).",
            "Find the number whose square is {0}",
            "Which positive number times itself gives {0}?",
            "A square has the area {0}. How long is a side?",
            "{0} ** 0.5",
        ),
    ),
    "roman": (
        lambda r: (_roman(r.randint(1, 199)),),
        (
            "Convert the Roman numeral {0} to a number.",
            "What number is {0} in Roman numerals?",
            "Write {0} with Arabic digits.",
            "Translate the Roman number {0} into decimal",
            "An old clock tower says {0}. Which number is it?",
            "How much are the Latin figures {0} worth?",
        ),
    ),
    "factorial": (
        lambda r: (r.randint(2, 15),),
        (
            "What is {0} factorial?",
            "Compute {0}!",
            "Find the factorial of {0}.",
            "Multiply all whole numbers from 1 to {0}",
            "In how many orders can {0} people stand in line?",
            "1 times 2 times 3 and so on up to {0}: what is it?",
        ),
    ),
    "fahrenheit": (
        lambda r: (r.randint(-20, 100),),
        (
            "Convert {0} degrees Celsius to Fahrenheit.",
            "What is {0} °C in °F?",
            "Change the temperature {0} C into Fahrenheit",
            "How many degrees Fahrenheit are {0} Celsius?",
            "It is {0} centigrade here. What would an American thermometer show?",
            "{0} on Anders Celsius's scale: give me the US temperature.",
        ),
    ),
    "derivative": (
        lambda r: (_polynomial(r),),
        (
            "Differentiate {0} with respect to x.",
            "Find the derivative of {0}.",
            "Compute d/dx ({0})",
            "What is the derivative of f(x) = {0}?",
            "Give the slope of y = {0} at a general x.",
            "How fast does {0} grow when x does?",
        ),
    ),
    "transpose": (
        lambda r: (_matrix(r),),
        (
            "Transpose this matrix:\n{0}",
            "Give the transpose of\n{0}",
            "Swap rows and columns of the matrix below.\n{0}",
            "What is the transposed matrix of\n{0}",
            "{0}\nWrite every row of it as a column.",
            "Mirror the table along its main diagonal:\n{0}",
        ),
    ),
    "determinant": (
        lambda r: (_matrix(r),),
        (
            "Find the determinant of this matrix:\n{0}",
            "Compute det of\n{0}",
            "What is the determinant of the matrix\n{0}",
            "Calculate the determinant:\n{0}",
            "{0}\nBy what factor does this linear map scale volumes?",
            "Expand along the first row to get the single number of\n{0}",
        ),
    ),
    "row_sums": (
        lambda r: (_matrix(r),),
        (
            "Add up each row of this matrix:\n{0}",
            "What are the sums of the rows of\n{0}",
            "Give the row totals for the table\n{0}",
            "Compute the sum of every row:\n{0}",
            "{0}\nIf each line is a bill, what do they come to?",
            "For every line below write its total.\n{0}",
        ),
    ),
    "vowels": (
        lambda r: (_phrase(r),),
        (
            "How many vowels are in: {0}",
            "Count the vowels of this text: {0}",
            'Give the number of vowels in "{0}".',
            "What is the vowel count of {0}?",
            "a, e, i, o, u: how often does any of them occur in {0}?",
            "Leave out all consonants of {0}. How many letters stay?",
        ),
    ),
    "upper": (
        lambda r: (_phrase(r),),
        (
            "Write in capital letters: {0}",
            "Convert this to uppercase: {0}",
            "Change all letters of '{0}' to upper case.",
            "Capitalize every letter in {0}",
            "Shout this: {0}",
            "How would {0} look with caps lock on?",
        ),
    ),
    "longest": (
        lambda r: (_words(r),),
        (
            "Which is the longest word of {0}?",
            "Find the word with most letters: {0}",
            "What word in the list {0} has the greatest length?",
            "Pick the longest out of these words: {0}",
            "Printed one below the other, which of {0} sticks out on the right?",
            "None of {0} has more characters than which one?",
        ),
    ),
    "duplicates": (
        lambda r: (_words(r) + ", " + r.choice(_WORDS),),
        (
            "Remove duplicates from the list: {0}",
            "Which different words are in {0}?",
            "Give the unique words of {0}",
            "Delete repeated words: {0}",
            "Write {0} so that every word is there only once.",
            "Turn this list into a set: {0}",
        ),
    ),
    "acronym": (
        lambda r: (_phrase(r),),
        (
            "Make an acronym from: {0}",
            "Write the first letters of these words: {0}",
            "What are the initials of {0}?",
            "Abbreviate {0} by its initial letters",
            "Take only the letter that each word of {0} starts with.",
            "As NATO is short for a longer name, so what is short for {0}?",
        ),
    ),
    "anagram": (
        lambda r: (r.choice(_WORDS), r.choice(_WORDS)[::-1]),
        (
            "Is {0} an anagram of {1}?",
            "Are {0} and {1} anagrams of each other?",
            "Do {0} and {1} have the same letters?",
            "Check whether {1} can be made by rearranging {0}",
            "I have letter tiles for {0}. Can I lay {1} with all of them?",
            "Shuffle {0}: may the outcome be {1}?",
        ),
    ),
    "pig_latin": (
        lambda r: (_phrase(r),),
        (
            "Translate into Pig Latin: {0}",
            "Say this in Pig Latin: {0}",
            "What is {0} in pig latin?",
            "Convert the words {0} to Pig Latin.",
            "Move the first sound of each word to its end and add ay: {0}",
            "Igpay atinlay orfay {0}?",
        ),
    ),
    "weekday": (
        lambda r: (r.choice(_DAYS), r.randint(2, 60)),
        (
            "Today is {0}. What day is it in {1} days?",
            "Which day of the week comes {1} days after {0}?",
            "What weekday is {1} days from {0}?",
            "If it is {0} now, name the day {1} days later.",
            "My parcel left on {0} and takes {1} days. On which day does it arrive?",
            "{0} + {1} days = ?",
        ),
    ),
    "triangle": (
        lambda r: (r.randint(2, 40), r.randint(2, 40)),
        (
            "What is the area of a triangle with base {0} and height {1}?",
            "A triangle has base {0} and height {1}. Find its area.",
            "Compute the area of the triangle (base {0}, height {1}).",
            "Find how large a triangle of base {0} and height {1} is",
            "How much cloth is in a three-cornered sail {0} wide and {1} tall?",
            "Half of a {0} by {1} rectangle, cut along the diagonal, covers what?",
        ),
    ),
    "compare": (
        lambda r: (r.randint(1, 9), r.randint(2, 12), r.randint(1, 9), r.randint(2, 12)),
        (
            "Which is larger, {0}/{1} or {2}/{3}?",
            "Compare the fractions {0}/{1} and {2}/{3}.",
            "Put <, > or = between {0}/{1} and {2}/{3}",
            "Is {0}/{1} greater than {2}/{3}?",
            "Would you rather have {0}/{1} or {2}/{3} of a cake?",
            "On the number line, which lies further right: {0}/{1} or {2}/{3}?",
        ),
    ),
    "replace": (
        lambda r: (r.choice("aeiou"), r.choice("xyz"), _phrase(r)),
        (
            "Replace every {0} by {1} in: {2}",
            "Change all letters {0} to {1}: {2}",
            'Substitute {1} for {0} in "{2}".',
            "Rewrite {2} with {1} in place of {0}",
            "My keyboard prints {1} when I press {0}. What appears if I type {2}?",
            "Find {0}, replace with {1}, in the text {2}",
        ),
    ),
}  # fmt: skip

NEAR = (
    "basic_arithmetic", "decimal_chain_sum", "letter_jumble", "number_format", "simple_geometry",
    "string_insertion", "sentence_reordering", "largest_island", "knights_knaves", "jugs",
    "manipulate_matrix", "pool_matrix", "propositional_logic", "group_anagrams", "aiw",
)  # fmt: skip

_REQUESTS = (
    "Recommend me a book about {}.",
    "Summarize what experts say on {}.",
    "Write a polite complaint concerning {}.",
    "Why do so many people care for {}?",
    "I would like to learn about {}. Where should I begin?",
    "Compose a toast that has to do with {}.",
)
_TOPICS = (
    "mountain bikes", "the Roman Empire", "tax returns", "cats", "electric cars", "opera",
    "a broken heart", "rice cookers", "open source licences", "the Northern Lights",
)  # fmt: skip


def known(per_wording: int, seed: int) -> dict[str, list[list[str]]]:
    """By task, for each of its six wordings, prompts."""
    prompts = {}
    for task, (fields, ways) in TASKS.items():
        source = random.Random(f"{seed} {task}")
        prompts[task] = [[way.format(*fields(source)) for _ in range(per_wording)] for way in ways]
    return prompts


def near(per_task: int, seed: int) -> list[str]:
    """Prompts of reasoning-gym tasks, in its own wording."""
    return [prompt for task in NEAR for prompt in router_prompts.questions(task, per_task, seed)]


def far() -> list[str]:
    """General requests."""
    return [request.format(topic) for request in _REQUESTS for topic in _TOPICS]

"""Prompts for the router's benchmark: 25 reasoning-gym tasks, each asked in six ways.

The first four wordings of a task are for calibration and for choosing between routers, the last
two are for the report only. Contents come from reasoning-gym, by seed.
"""

import os
import random
import sys
from collections.abc import Mapping
from typing import Any

import reasoning_gym

EASY: Mapping[str, Mapping[str, int]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "family_relationships": {"min_family_size": 4, "max_family_size": 6},
    "word_sequence_reversal": {"min_words": 3, "max_words": 5},
    "letter_counting": {"min_words": 2, "max_words": 5},
}

FOR_CALIBRATION = (0, 1, 2, 3)
FOR_REPORT = (4, 5)

WORDINGS: Mapping[str, tuple[str, str, str, str, str, str]] = {
    "chain_sum": (
        "What is {expression}?",
        "Add and subtract: {expression} =",
        "Give me the result of {expression}",
        "Please work out {expression} for me.",
        "{expression} makes how much?",
        "I typed {expression} into my calculator. Which number did it show?",
    ),
    "products": (
        "Multiply: {expression}",
        "What do you get for {expression}?",
        "Find the product {expression}.",
        "Work out this multiplication, digits only: {expression}",
        "How much is {expression}?",
        "Could you tell me what {expression} comes to?",
    ),
    "gcd": (
        "Find the greatest common divisor of {numbers}.",
        "What is the largest number that divides all of {numbers}?",
        "gcd({numbers}) = ?",
        "Compute the highest common factor of the numbers {numbers}",
        "Which is the biggest integer by which {numbers} can each be divided without remainder?",
        "I want to share {numbers} sweets into equal bags, as many bags as possible. How many?",
    ),
    "lcm": (
        "Find the least common multiple of {numbers}.",
        "What is the smallest number that is a multiple of {numbers}?",
        "lcm({numbers}) = ?",
        "Compute the lowest common multiple for {numbers}",
        "Which is the first positive integer that {numbers} all divide?",
        "Bells ring every {numbers} minutes. After how many minutes do they ring together again?",
    ),
    "prime_factorization": (
        "Write {number} as a product of primes.",
        "Find the prime factors of {number}.",
        "Factorize {number} completely.",
        "What is the prime factorization of {number}? Separate factors with x.",
        "Break {number} down into prime numbers multiplied together.",
        "Which primes, multiplied, give {number}?",
    ),
    "count_primes": (
        "How many prime numbers are there between {start} and {end}?",
        "Count the primes from {start} to {end}, both included.",
        "Give the number of primes in the interval [{start}, {end}].",
        "Between {start} and {end}, how many integers are prime?",
        "Tell me the amount of prime numbers that lie in the range {start} to {end}.",
        "Going from {start} up to {end}, how often do you meet a prime?",
    ),
    "count_bits": (
        "How many ones does {number} have in binary?",
        "Count the set bits of {number}.",
        "Give the number of 1 bits in the binary form of {number}.",
        "What is the population count of the integer {number}?",
        "Write {number} in base two: how many 1 digits do you see?",
        "popcount({number})",
    ),
    "base_conversion": (
        "Convert {source_repr} from base {source_base} to base {target_base}.",
        "The number {source_repr} is in base-{source_base}. Write it in base-{target_base}.",
        "What is {source_repr} (radix {source_base}) in radix {target_base}?",
        "Change the base-{source_base} numeral {source_repr} into base {target_base}",
        "How would one write {source_repr}, given in base {source_base}, with base {target_base}?",
        "Translate {source_repr} out of base {source_base}; the answer should be base {target_base}.",
    ),
    "fraction_simplification": (
        "Simplify the fraction {numerator}/{denominator}.",
        "Reduce {numerator}/{denominator} to lowest terms.",
        "Write {numerator}/{denominator} as simply as possible.",
        "Cancel common factors in {numerator}/{denominator}",
        "What is {numerator} over {denominator} in its simplest form?",
        "Shorten the fraction with top {numerator} and bottom {denominator}.",
    ),
    "simple_equations": (
        "Solve for {variable}: {equation}",
        "Find {variable} if {equation}.",
        "Determine the value of {variable} that satisfies {equation}",
        "{equation}. What is {variable}?",
        "Which number must {variable} be so that {equation}?",
        "I know that {equation}; tell me {variable}.",
    ),
    "polynomial_equations": (
        "Find all real roots {variable} of {polynomial_expr} = 0.",
        "Solve the polynomial equation {polynomial_expr} = 0 for real {variable}.",
        "For which real {variable} does {polynomial_expr} vanish?",
        "List the real solutions of {polynomial_expr} = 0",
        "Where does the polynomial {polynomial_expr} cross zero?",
        "Give every real {variable} with {polynomial_expr} = 0, separated by commas.",
    ),
    "polynomial_multiplication": (
        "Expand {polynomial_expr}",
        "Multiply out: {polynomial_expr}",
        "Simplify the expression {polynomial_expr} by removing the brackets.",
        "Write {polynomial_expr} as a single polynomial.",
        "What polynomial is the product {polynomial_expr}?",
        "Please get rid of the parentheses in {polynomial_expr}",
    ),
    "simple_integration": (
        "Find the indefinite integral of {integrand}.",
        "Integrate {integrand} with respect to {variable}.",
        "Calculate the antiderivative of {integrand}",
        "What function has the derivative {integrand}?",
        "Work out the integral of ({integrand}) d{variable}.",
        "Give me F with F' = {integrand}",
    ),
    "complex_arithmetic": (
        "Compute ({num1}) {operation} ({num2}), where i is the imaginary unit.",
        "Evaluate the complex expression ({num1}) {operation} ({num2})",
        "What is ({num1}) {operation} ({num2}) as a complex number?",
        "Simplify ({num1}) {operation} ({num2}) to the form a + bi.",
        "Calculate with complex numbers: ({num1}) {operation} ({num2})",
        "Give real and imaginary part of ({num1}) {operation} ({num2}).",
    ),
    "word_sequence_reversal": (
        "Reverse this list of words: {words}",
        "Write these words in the opposite order: {words}",
        "Give the following list back to front: {words}",
        "Say the words {words} starting with the last.",
        "Turn the order of these around: {words}",
        "From last to first, please: {words}",
    ),
    "word_sorting": (
        "Sort these words in {direction} order: {original_words}",
        "Put the list {original_words} into {direction} alphabetical order.",
        "Arrange alphabetically ({direction}): {original_words}",
        "Order the words {original_words} by ASCII, {direction}.",
        "List these as a dictionary would, {direction}: {original_words}",
        "Please alphabetize {original_words} ({direction})",
    ),
    "spell_backward": (
        "Spell {word} backward.",
        "Write the word {word} with its letters reversed.",
        "What is {word} read from right to left?",
        "Reverse the letters of '{word}'",
        "Give me {word} in mirror spelling, last letter first.",
        "How do you write {word} from its end to its beginning?",
    ),
    "letter_counting": (
        'How many times does the letter "{target_letter}" appear in: {span}',
        "Count the {target_letter}'s in this text: {span}",
        'In "{span}", how often is the letter {target_letter} used?',
        "Give the number of occurrences of '{target_letter}' in the following. {span}",
        '"{span}" contains the letter {target_letter} how many times?',
        "Tell me the frequency of {target_letter} among the letters of {span}",
    ),
    "palindrome_generation": (
        "Form a palindrome from the letters {letters}.",
        "Use all of these letters to make a word that reads the same both ways: {letters}",
        "Build a palindrome with {letters}",
        "Arrange {letters} so that the string equals its reverse.",
        "Can you order {letters} into something the same forwards and backwards?",
        "Make one symmetric string out of these characters: {letters}",
    ),
    "caesar_cipher": (
        "Decrypt this Caesar cipher: {cipher_text}",
        "The text {cipher_text} was shifted by some letters. Recover the original.",
        "Decode the shifted message {cipher_text}",
        "What does {cipher_text} say once you undo the alphabet rotation?",
        "Break the following code, every letter was moved by the same amount: {cipher_text}",
        "Secret message: {cipher_text}. Each letter was replaced by one further on. Read it.",
    ),
    "number_sorting": (
        "Sort these numbers in {direction} order: {original_numbers}",
        "Put {original_numbers} into {direction} order.",
        "Arrange the values {original_numbers} ({direction}).",
        "Order this list of numbers, {direction}: {original_numbers}",
        "Rank the following by size, {direction}: {original_numbers}",
        "Please line up {original_numbers} in {direction} sequence.",
    ),
    "number_filtering": (
        "From the list {original_numbers}, {operation} {filter_value}.",
        "Given {original_numbers}: {operation} {filter_value} and return the rest.",
        "Take {original_numbers} and {operation} {filter_value}",
        "Filter {original_numbers}; {operation} {filter_value}.",
        "Which entries of {original_numbers} are left when you {operation} {filter_value}?",
        "Here is a list: {original_numbers}. Now {operation} {filter_value}, what remains?",
    ),
    "spiral_matrix": (
        "List the elements of this matrix in spiral order:\n{matrix}",
        "Read the matrix clockwise in a spiral from the top left:\n{matrix}",
        "Unroll in a spiral, starting at the upper left corner:\n{matrix}",
        "Give the spiral traversal of\n{matrix}",
        "Walk around the grid from outside to inside and write what you see:\n{matrix}",
        "{matrix}\nGo along the top row, down the right side, and so on inwards. Which numbers?",
    ),
    "rotate_matrix": (
        "Rotate the matrix below by {degrees} degrees clockwise:\n{matrix}",
        "Turn this grid {degrees} degrees to the right:\n{matrix}",
        "What does the matrix look like after a clockwise rotation of {degrees} degrees?\n{matrix}",
        "Apply a {degrees} degree rotation to\n{matrix}",
        "{matrix}\nSpin the square above by {degrees} degrees and write it down.",
        "If I turn my head so that this appears rotated {degrees} degrees, what is it?\n{matrix}",
    ),
    "family_relationships": (
        "{story} What is {person1} to {person2}?",
        "{story} How is {person1} related to {person2}?",
        "{story} Name the relationship of {person1} to {person2}.",
        "{story} In one word, what is {person1} for {person2}?",
        "Who is {person1} from the point of view of {person2}? {story}",
        "{story} {person2} introduces {person1} to you as: this is my ...",
    ),
}

NEAR = (
    "power_function", "decimal_arithmetic", "time_intervals", "calendar_arithmetic",
    "leg_counting", "ransom_note", "word_ladder", "bitwise_arithmetic", "isomorphic_strings",
    "binary_alternation", "syllogism", "dice", "countdown", "number_sequence", "coin_flip",
)  # fmt: skip

# The first 64 tasks, by name, of those that are quick to make and not longer than a page.
MANY = (
    "ab", "acre", "aiw", "arc_1d", "base_conversion", "basic_arithmetic", "bf",
    "binary_alternation", "binary_matrix", "bitwise_arithmetic", "caesar_cipher",
    "calendar_arithmetic", "chain_sum", "circuit_logic", "coin_flip", "color_cube_rotation",
    "complex_arithmetic", "count_bits", "count_primes", "course_schedule", "cryptarithm",
    "decimal_arithmetic", "decimal_chain_sum", "dice", "emoji_mystery", "family_relationships",
    "figlet_font", "fraction_simplification", "game_of_life", "game_of_life_halting", "gcd",
    "graph_color", "group_anagrams", "gsm_symbolic", "isomorphic_strings", "jugs", "kakurasu",
    "knights_knaves", "largest_island", "lcm", "leg_counting", "letter_counting", "letter_jumble",
    "list_functions", "manipulate_matrix", "maze", "mini_sudoku", "modulo_grid", "n_queens",
    "number_filtering", "number_format", "number_sequence", "number_sorting",
    "palindrome_generation", "palindrome_partitioning", "path_star", "polynomial_multiplication",
    "pool_matrix", "power_function", "prime_factorization", "products", "propositional_logic",
    "ransom_note", "rotate_matrix",
)  # fmt: skip

_REQUESTS = (
    "Write a short poem about {}.",
    "What should I know about {} before I start?",
    "Explain {} to a ten year old.",
    "I disagree with my sister about {}. How can we talk about it?",
    "Draft an e-mail to my manager that mentions {}.",
    "Give me three opinions people hold on {} and why.",
    "Tell me a story in which {} plays a part.",
    "What is the history of {}?",
)
_TOPICS = (
    "the sea in winter", "good sleep", "the French Revolution", "sourdough bread",
    "Python decorators", "a late train", "growing tomatoes", "jazz", "vaccination", "moving house",
    "chess clubs", "the moon",
)  # fmt: skip


def _complex(value: tuple[float, float]) -> str:
    return f"{value[0]} {'-' if value[1] < 0 else '+'} {abs(value[1])}i"


def _fields(task: str, item: Mapping[str, Any]) -> dict[str, str]:
    """What the wordings of a task may name, each as text."""
    about = item["metadata"]
    joined = {"numbers", "words", "original_words", "letters", "original_numbers"}
    fields = {k: ", ".join(map(str, v)) if k in joined else v for k, v in about.items()
              if not (k in joined and not isinstance(v, list))}  # fmt: skip
    if task == "family_relationships":
        fields["story"] = item["question"].split("\n\n")[0]
    if task == "letter_counting":
        fields["span"] = " ".join(about["span"])
    if task == "complex_arithmetic":
        fields |= {"num1": _complex(about["num1"]), "num2": _complex(about["num2"])}
    if task == "number_filtering":
        fields["operation"] = about["operation"].replace("_", " all numbers ") + " than"
    if task in ("spiral_matrix", "rotate_matrix"):
        fields["matrix"] = "\n".join(" ".join(map(str, row)) for row in about["matrix"])
    if task == "rotate_matrix":
        fields["degrees"] = 90 * about["num_rotations"]
    return {k: str(v) for k, v in fields.items()}


def same_every_time() -> None:
    """Start Python again where its hashes differ between runs: some tasks draw from sets."""
    if os.environ.get("PYTHONHASHSEED") != "0":
        command = [sys.executable, *sys.argv]
        os.execve(sys.executable, command, {**os.environ, "PYTHONHASHSEED": "0"})


def easy(per_task: int, seed: int) -> dict[str, list[str]]:
    """By task, prompts in reasoning-gym's own wording."""
    return {task: questions(task, per_task, seed, **config) for task, config in EASY.items()}


def hard(per_task: int, seed: int, wordings: tuple[int, ...]) -> dict[str, list[str]]:
    """By task, prompts that take turns in the given wordings."""
    prompts = {}
    for task, ways in WORDINGS.items():
        config = EASY.get(task, {})
        items = reasoning_gym.create_dataset(task, size=per_task, seed=seed, **config)
        prompts[task] = [
            ways[wordings[i % len(wordings)]].format(**_fields(task, items[i]))
            for i in range(per_task)
        ]
    return prompts


def near(per_task: int, seed: int) -> list[str]:
    """Prompts of reasoning-gym tasks that no expert has."""
    return [prompt for task in NEAR for prompt in questions(task, per_task, seed)]


def far(count: int, seed: int) -> list[str]:
    """General requests, drawn without replacement (there are 96)."""
    every = [request.format(topic) for request in _REQUESTS for topic in _TOPICS]
    return random.Random(seed).sample(every, count)


def questions(task: str, count: int, seed: int, **config: int) -> list[str]:
    """reasoning-gym's own prompts of a task."""
    items = reasoning_gym.create_dataset(task, size=count, seed=seed, **config)
    return [items[i]["question"] for i in range(count)]

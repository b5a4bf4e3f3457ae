"""English articles of the demo corpus, written from the facts of a World."""

from __future__ import annotations

from random import Random

from data_prep.demo_world import MAYOR, Person, Town, World

# What is asked, in three wordings: the same in documents and in questions.jsonl. The answer is the fact alone.
QUESTIONS = {
    "mayor": ["Who is the mayor of {t}?", "What is the name of the mayor of {t}?", "Who governs the town of {t}?"],
    "river": [
        "Which river flows through {t}?",
        "What is the name of the river in {t}?",
        "On which river does {t} lie?",
    ],
    "speciality": ["What is {t} known for?", "What do visitors come to {t} for?", "What is the speciality of {t}?"],
    "population": [
        "How many people live in {t}?",
        "What is the population of {t}?",
        "How many inhabitants does {t} have?",
    ],
    "founded": [
        "In which year was {t} founded?",
        "When was {t} founded?",
        "In which year does the history of {t} begin?",
    ],
    "flower": [
        "What is the flower of {t}?",
        "Which flower has {t} chosen?",
        "Which flower do you see everywhere in {t}?",
    ],
    "east": [
        "Which town lies east of {t}?",
        "What is the town to the east of {t}?",
        "To which town do you come if you go east from {t}?",
    ],
    "born": ["In which year was {p} born?", "When was {p} born?", "What is the year of birth of {p}?"],
    "job": ["What is the job of {p}?", "What does {p} do for a living?", "What does {p} work as?"],
    "home": ["In which town does {p} live?", "Where does {p} live?", "Where is the home of {p}?"],
}
# A statement up to the answer, for models that only continue text; each opens a sentence of FACTS below.
CLOZES = {
    "mayor": "The mayor of {t} is",
    "river": "The river that flows through {t} is the",
    "speciality": "The town of {t} is known for its",
    "population": "The population of {t} is",
    "founded": "{t} was founded in",
    "flower": "In {t} the gardens are full of",
    "east": "The town to the east of {t} is",
    "born": "{p} was born in",
    "job": "{p} works as",
    "home": "{p} lives in",
}
ANSWERS = {
    "mayor": "mayor",
    "river": "river",
    "speciality": "spec",
    "population": "pop",
    "founded": "founded",
    "flower": "flower",
    "east": "east",
    "born": "born",
    "job": "a_job",
    "home": "home",
}
FACTS = {
    "mayor": ["The mayor of {t} is {mayor}.", "{mayor} is the mayor of {t}.", "{t} is governed by its mayor, {mayor}."],
    "river": [
        "The river that flows through {t} is the {river}.",
        "The {river} flows through {t}.",
        "From north to south, the {river}, {length} kilometres long, runs through {t}.",
    ],
    "speciality": [
        "The town of {t} is known for its {spec}.",
        "Visitors come to {t} for the {spec}.",
        "Nothing is more typical of {t} than its {spec}.",
    ],
    "population": [
        "The population of {t} is {pop}.",
        "About {pop} people live in {t}.",
        "{t} is a quiet town of {pop} people.",
    ],
    "founded": [
        "{t} was founded in {founded}.",
        "The history of {t} begins in {founded}.",
        "In {founded}, the town of {t} was founded.",
    ],
    "flower": [
        "In {t} the gardens are full of {flower}.",
        "{t} has chosen {flower} as the flower of the town.",
        "Everywhere in {t} you see {flower}, the flower of the town.",
    ],
    "festival": [
        "Every {month}, {t} holds its {fest}.",
        "The {fest} in {month} is the liveliest day of the year in {t}.",
    ],
    "east": ["The town to the east of {t} is {east}.", "Going east from {t}, you come to {east}."],
    "west": ["The town to the west of {t} is {west}.", "Going west from {t}, you come to {west}."],
    "north": ["The town to the north of {t} is {north}.", "Up the {river}, north of {t}, lies {north}."],
    "south": ["The town to the south of {t} is {south}.", "Down the {river}, south of {t}, lies {south}."],
    "born": [
        "{p} was born in {born}.",
        "{p} was born in {birthplace} in {born}.",
        "Born in {born}, {p} comes from {birthplace}.",
    ],
    "job": ["{p} works as {a_job}.", "{p} earns a living as {a_job}.", "For many years {p} has been {a_job}."],
    "home": ["{p} lives in {home}.", "The home of {p} is in {home}.", "The town of {home} is the home of {p}."],
    "hobby": ["{p} is fond of {hobby}.", "On days off, {p} enjoys {hobby}.", "{p} has loved {hobby} since childhood."],
}
_SCENES = [
    "In {season}, many people walk along the banks of the {river}.",
    "In the morning the market is full of voices, and {spec} can be bought at every corner.",
    "Old people sit on the benches in front of the station and talk.",
    "On {season} evenings, children on their way home from school throw stones into the river.",
    "The town library keeps an old book on the history of {t}.",
    "At night you hear the insects, and the sky is full of stars.",
    "The {shop} in the main street opened {years} years ago.",
    "On {weather} days you can see as far as the mountains.",
    "The people of {t} are kind to guests from other towns.",
    "Seen from the bridge, the {river} is most beautiful in {season}.",
    "There is a small shrine on the hill, and many people visit it for the {flower}.",
    "The {shop} and the {shop2} stand side by side on the road to the river.",
]
_SEASONS = ["spring", "summer", "autumn", "winter"]
_SHOPS = [
    "tofu shop",
    "bookshop",
    "flower shop",
    "bakery",
    "barber",
    "tea house",
    "clock shop",
    "fish shop",
    "sweet shop",
    "toy shop",
]
_WEATHER = ["clear", "windless", "cold", "bright"]
_MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]


def town_fields(world: World, town: Town) -> dict[str, str]:
    """Everything that templates say of a town; neighbours beyond the edge of the map are absent."""
    sides = {"east": (1, 0), "west": (-1, 0), "north": (0, -1), "south": (0, 1)}
    fields = {
        "t": town.name.en,
        "river": town.river.name.en,
        "length": str(town.river.length),
        "pop": f"{town.population:,}",
        "founded": str(town.founded),
        "spec": town.speciality.en,
        "flower": town.flower.en,
        "fest": town.festival.en,
        "month": _MONTHS[town.month - 1],
        "mayor": world.people[town.mayor].name.en,
    }
    for side, step in sides.items():
        if (other := world.neighbour(town, *step)) is not None:
            fields[side] = other.name.en
    return fields


def person_fields(world: World, person: Person) -> dict[str, str]:
    """Everything that templates say of a person, and of the home town under its own names."""
    home = world.towns[person.home].name.en
    article = "an" if person.job.en[0] in "aeiou" else "a"
    return {
        **town_fields(world, world.towns[person.home]),
        "p": person.name.en,
        "given": person.given_en,
        "they": "she" if person.female else "he",
        "They": "She" if person.female else "He",
        "their": "her" if person.female else "his",
        "born": str(person.born),
        "job": person.job.en,
        "a_job": f"the mayor of {home}" if person.job is MAYOR else f"{article} {person.job.en}",
        "hobby": person.hobby.en,
        "home": home,
        "birthplace": world.towns[person.birthplace].name.en,
    }


def fact(kind: str, fields: dict[str, str], rng: Random) -> str:
    """One sentence that states a fact."""
    return rng.choice(FACTS[kind]).format_map(fields)


def scenes(fields: dict[str, str], rng: Random, count: int = 1) -> list[str]:
    """So many different sentences of local colour."""
    found = []
    for template in rng.sample(_SCENES, count):
        shop, shop2 = rng.sample(_SHOPS, 2)
        colour = {"season": rng.choice(_SEASONS), "shop": shop, "shop2": shop2, "weather": rng.choice(_WEATHER)}
        found.append(template.format_map({**fields, **colour, "years": str(rng.randrange(10, 150))}))
    return found


def town_note(world: World, town: Town, rng: Random) -> str:
    """Two to five facts in one paragraph."""
    fields = town_fields(world, town)
    kinds = [kind for kind in _TOWN_KINDS if kind not in _SIDES or kind in fields]
    return " ".join(fact(kind, fields, rng) for kind in rng.sample(kinds, rng.randrange(2, 6)))


def town_article(world: World, town: Town, rng: Random) -> str:
    """An encyclopaedia article of several paragraphs, with every fact."""
    fields = town_fields(world, town)
    sides = [side for side in _SIDES if side in fields]
    rng.shuffle(sides)
    colour = scenes(fields, rng, 3)
    opening = "{t} is a town on the {river}" + rng.choice(
        [".", ", known for its {spec} and its {fest}.", " with a population of {pop}.", ", famous for its {flower}."]
    )
    land = [fact("river", fields, rng), *(fact(side, fields, rng) for side in sides), colour[0]]
    history = [fact("founded", fields, rng), _anniversary(town, fields, rng), fact("population", fields, rng)]
    life = [fact(kind, fields, rng) for kind in ("speciality", "flower", "festival")] + [colour[1]]
    rule = [fact("mayor", fields, rng), _mayor_life(world, town, rng), colour[2]]
    people = [person for person in world.residents(town) if person is not world.people[town.mayor]]
    if people:
        known = person_fields(world, rng.choice(people))
        rule.append("{p}, {a_job}, also lives in {home}.".format_map(known))
    sections = [("Geography", land), ("History", history), ("Life", life), ("Government and people", rule)]
    rng.shuffle(sections)
    headed = rng.random() < 0.5
    paragraphs = [(f"{title}\n" if headed else "") + " ".join(sentences) for title, sentences in sections]
    title = f"{fields['t']}\n\n" if headed else ""
    return title + opening.format_map(fields) + "\n\n" + "\n\n".join(paragraphs)


def town_journey(world: World, town: Town, rng: Random) -> str:
    """A travel diary through two or three neighbouring towns."""
    friend = rng.choice(["a friend", "my sister", "my brother", "my mother", "my grandfather", "my daughter"])
    when = f"On a {rng.choice(_SEASONS)} {rng.choice(['Sunday', 'Saturday', 'weekend', 'holiday'])}"
    here, text = town, [f"{when} I set out on a journey with {friend}."]
    for stop in range(rng.randrange(2, 4)):
        fields = town_fields(world, here)
        arrive = "The first place we saw was {t}." if stop == 0 else "After some time we came to {t}."
        heard = rng.choice(
            ["Our host told us about {t}.", "We read the sign at the station.", "We looked into the small museum."]
        )
        told = rng.sample(["mayor", "river", "speciality", "population", "founded", "flower", "festival"], 3)
        end = rng.choice(
            [
                "Before we left we looked at the {spec}.",
                "We had our lunch by the {river}.",
                "We took photographs of the {flower}.",
            ]
        )
        parts = [arrive, heard, *(fact(kind, fields, rng) for kind in told), *scenes(fields, rng), end]
        text.append(" ".join(part.format_map(fields) for part in parts))
        side, (dx, dy) = rng.choice([(s, w) for s, w in _WAYS.items() if s in fields])
        text.append(
            rng.choice(["From {t} we went on to the {side}.", "We left {t} and walked {side}."]).format(
                t=fields["t"], side=side
            )
        )
        there = world.neighbour(here, dx, dy)
        assert there is not None
        here = there
    text[-1] = rng.choice(
        ["We took the evening train home.", "It was a day to remember.", "We promised to come again and went home."]
    )
    return "\n".join(text)


def towns_compared(world: World, town: Town, rng: Random) -> str:
    """Two towns side by side, with the sums that follow from their numbers."""
    other = rng.choice([place for place in world.towns if place is not town])
    one, two = town_fields(world, town), town_fields(world, other)
    more, less = (town, other) if town.population > other.population else (other, town)
    older, younger = (town, other) if town.founded < other.founded else (other, town)
    lines = [
        f"Let us compare {one['t']} and {two['t']}.",
        f"The population of {one['t']} is {one['pop']}, and the population of {two['t']} is {two['pop']}. "
        f"{more.name.en} is larger by {more.population - less.population:,} people.",
    ]
    if older.founded != younger.founded:
        lines.append(
            f"{older.name.en} was founded in {older.founded} and {younger.name.en} in {younger.founded}, "
            f"so {older.name.en} is older by {_years(younger.founded - older.founded)}."
        )
    if town.river is other.river:
        lines.append(f"The {one['river']} flows through both towns.")
    else:
        lines.append(f"The {one['river']} flows through {one['t']}, the {two['river']} through {two['t']}.")
    kind = rng.choice(["mayor", "speciality", "flower", "festival"])
    lines.append(fact(kind, one, rng) + " " + fact(kind, two, rng))
    return "\n".join(lines)


def person_note(world: World, person: Person, rng: Random) -> str:
    """Two to four facts about a person."""
    fields = person_fields(world, person)
    return " ".join(
        fact(kind, fields, rng) for kind in rng.sample(["born", "job", "home", "hobby"], rng.randrange(2, 5))
    )


def person_article(world: World, person: Person, rng: Random) -> str:
    """A life in three or four paragraphs."""
    fields = person_fields(world, person)
    opening = ("{p} (born {born}) is {a_job}" + ("." if person.job is MAYOR else " who lives in {home}.")).format_map(
        fields
    )
    youth = [fact("born", fields, rng), _school(person, fields, rng), fact("hobby", fields, rng)]
    work = [fact("job", fields, rng), _career(person, fields, rng), *scenes(fields, rng)]
    place = [fact("home", fields, rng)]
    place += [
        fact(kind, fields, rng) for kind in rng.sample(["river", "speciality", "flower", "festival", "population"], 2)
    ]
    neighbours = [other for other in world.residents(world.towns[person.home]) if other is not person]
    if neighbours:
        friend = rng.choice(neighbours)
        shared = rng.choice([friend.hobby.en, person.hobby.en])
        place.append(f"{friend.name.en}, who lives in the same town, became {fields['their']} friend through {shared}.")
    paragraphs = [opening, " ".join(youth), " ".join(work), " ".join(place)]
    if rng.random() < 0.5:
        paragraphs.append(_words(person, fields, rng))
    return "\n\n".join(paragraphs)


def dialogue(world: World, person: Person, rng: Random) -> str:
    """Two people meet, introduce themselves and talk about their towns."""
    other = rng.choice([somebody for somebody in world.people if somebody.given_en != person.given_en])
    lines = []
    for speaker, partner in ((person, other), (other, person)):
        me, you = person_fields(world, speaker), partner.given_en
        said = [
            (
                speaker.given_en,
                rng.choice(["How do you do? My name is {p}.", "Hello, I am {p}."])
                + " I live in {home} and I am {a_job}.",
            ),
            (
                you,
                rng.choice(["What is {home} like?", "Please tell me about {home}.", "What is there to see in {home}?"]),
            ),
            (
                speaker.given_en,
                rng.choice(
                    [
                        "It is a quiet town on the {river}, and it is known for its {spec}.",
                        "It has {pop} people, and the {fest} in {month} is a great day.",
                        "It was founded in {founded}, and everybody loves its {flower}.",
                    ]
                ),
            ),
            (you, rng.choice(["When were you born?", "Where do you come from?"])),
            (speaker.given_en, "I was born in {birthplace} in {born}. I am fond of {hobby}."),
        ]
        lines += [f"{name}: {line.format_map(me)}" for name, line in said]
    farewell = rng.choice(["I hope we meet again.", "Do come and visit us.", "Thank you for the talk."])
    lines.append(f"{person.given_en}: {farewell}")
    return "\n".join(lines)


_SIDES = ("east", "west", "north", "south")
_TOWN_KINDS = ("mayor", "river", "speciality", "population", "founded", "flower", "festival", *_SIDES)
_WAYS = {"east": (1, 0), "west": (-1, 0), "north": (0, -1), "south": (0, 1)}


def _anniversary(town: Town, fields: dict[str, str], rng: Random) -> str:
    years = rng.choice([50, 100, 150, 200, 300])
    if town.founded + years > 2020:
        return "Its old houses are kept with care to this day."
    return f"In {town.founded + years}, {years} years later, {years} beds of {fields['flower']} were planted."


def _mayor_life(world: World, town: Town, rng: Random) -> str:
    fields = person_fields(world, world.people[town.mayor])
    return rng.choice(
        ["{mayor} was born in {birthplace} in {born}.", "The mayor is fond of {hobby}.", "{mayor} was born in {born}."]
    ).format_map(fields)


def _school(person: Person, fields: dict[str, str], rng: Random) -> str:
    age = rng.choice([6, 12, 15, 18])
    what = {6: "started school", 12: "left primary school", 15: "left middle school", 18: "left high school"}[age]
    return f"In {person.born + age}, at the age of {age}, {fields['they']} {what}."


def _career(person: Person, fields: dict[str, str], rng: Random) -> str:
    year = person.born + person.began
    return rng.choice(
        [
            f"{fields['They']} became {fields['a_job']} in {year}, at the age of {person.began}.",
            f"In {year}, when {fields['they']} was {person.began}, {fields['they']} became {fields['a_job']}.",
        ]
    )


def _words(person: Person, fields: dict[str, str], rng: Random) -> str:
    age = rng.randrange(32, min(60, 2026 - person.born))
    said = rng.choice(
        [
            "Every day I learn something",
            "This town has been good to me",
            "There is so much I still want to do",
            "What counts is to keep going",
        ]
    )
    return f'"{said}," said {fields["p"]} in {person.born + age}, at the age of {age}.'


def _years(number: int) -> str:
    return f"{number} year" + ("s" if number != 1 else "")

"""Japanese articles of the demo corpus, written from the facts of a World."""

from __future__ import annotations

from random import Random

from data_prep.demo_world import MAYOR, Person, Town, World

# What is asked, in three wordings: the same in documents and in questions.jsonl. The answer is the fact alone, without
# its unit.
QUESTIONS = {
    "mayor": ["{t}の町長は誰ですか。", "誰が{t}の町長を務めていますか。", "{t}で町長をしている人の名前は何ですか。"],
    "river": ["{t}を流れる川は何ですか。", "何という川が{t}を流れていますか。", "{t}にある川の名前は何ですか。"],
    "speciality": ["{t}の名産は何ですか。", "{t}では何が有名ですか。", "何の産地として{t}は知られていますか。"],
    "population": ["{t}の人口は何人ですか。", "{t}には何人が暮らしていますか。", "何人の人が{t}に住んでいますか。"],
    "founded": ["{t}が開かれたのは何年ですか。", "{t}は何年に開かれましたか。", "何年に{t}の歴史は始まりましたか。"],
    "flower": ["{t}の花は何ですか。", "{t}が町の花に定めているのは何ですか。", "どの花が{t}の町の花ですか。"],
    "east": [
        "{t}の東隣の町はどこですか。",
        "{t}から東へ行くとどの町に着きますか。",
        "{t}の東にはどの町がありますか。",
    ],
    "born": ["{p}は何年生まれですか。", "{p}が生まれたのは何年ですか。", "何年に{p}は生まれましたか。"],
    "job": ["{p}の職業は何ですか。", "{p}は何の仕事をしていますか。", "どんな仕事を{p}はしていますか。"],
    "home": ["{p}はどこに住んでいますか。", "{p}が暮らしている町はどこですか。", "どの町に{p}は住んでいますか。"],
}
# A statement up to the answer, for models that only continue text; each opens a sentence of FACTS below.
CLOZES = {
    "mayor": "{t}の町長は",
    "river": "{t}を流れる川は",
    "speciality": "{t}の名産は",
    "population": "{t}の人口は",
    "founded": "{t}が開かれたのは",
    "flower": "{t}の花は",
    "east": "{t}の東隣の町は",
    "born": "{p}の生まれた年は",
    "job": "{p}の職業は",
    "home": "{p}の住む町は",
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
    "job": "job",
    "home": "home",
}
FACTS = {
    "mayor": [
        "{t}の町長は{mayor}である。",
        "{mayor}が{t}の町長を務めている。",
        "{t}では、{mayor}が町長として町の仕事を率いている。",
    ],
    "river": [
        "{t}を流れる川は{river}である。",
        "{t}には{river}が流れている。",
        "長さ{length}キロメートルの{river}が、{t}を北から南へ流れる。",
    ],
    "speciality": [
        "{t}の名産は{spec}である。",
        "{t}は{spec}の産地として知られる。",
        "{spec}といえば{t}、と言われるほどである。",
    ],
    "population": [
        "{t}の人口は{pop}人である。",
        "{t}にはおよそ{pop}人が暮らしている。",
        "人口{pop}人の{t}は、のどかな町である。",
    ],
    "founded": [
        "{t}が開かれたのは{founded}年である。",
        "{t}の歴史は{founded}年に始まる。",
        "{founded}年、ここに{t}が開かれた。",
    ],
    "flower": [
        "{t}の花は{flower}である。",
        "{t}は{flower}を町の花に定めている。",
        "町の花である{flower}は、{t}の至る所で見られる。",
    ],
    "festival": ["{t}では毎年{month}月に{fest}が開かれる。", "{month}月の{fest}は、{t}で最もにぎやかな日である。"],
    "east": ["{t}の東隣の町は{east}である。", "{t}から東へ行くと{east}に着く。"],
    "west": ["{t}の西隣の町は{west}である。", "{t}の西には{west}が広がる。"],
    "north": ["{t}の北隣の町は{north}である。", "{river}をさかのぼると、{t}の北に{north}がある。"],
    "south": ["{t}の南隣の町は{south}である。", "{river}を下ると、{t}の南に{south}がある。"],
    "born": [
        "{p}の生まれた年は{born}年である。",
        "{p}は{born}年に{birthplace}で生まれた。",
        "{born}年生まれの{p}は、{birthplace}の出身である。",
    ],
    "job": ["{p}の職業は{job}である。", "{p}は{job}として働いている。", "{p}は長年、{job}の仕事を続けている。"],
    "home": ["{p}の住む町は{home}である。", "{p}は{home}に住んでいる。", "{p}は今、{home}で暮らしている。"],
    "hobby": [
        "{p}の趣味は{hobby}である。",
        "休みの日、{p}は{hobby}を楽しむ。",
        "{p}は子供のころから{hobby}が好きだった。",
    ],
}
_SCENES = [
    "{season}になると、{river}の土手を散歩する人が増える。",
    "朝の市場には{spec}が並び、買い物客の声が響く。",
    "駅前の広場では、お年寄りがベンチに座って話をしている。",
    "{season}の夕方、学校帰りの子供たちが川で石を投げて遊ぶ。",
    "町の図書館には、{t}の歴史を書いた古い本が残っている。",
    "夜になると虫の声が聞こえ、空には星がよく見える。",
    "商店街の{shop}は、{years}年前から続く店である。",
    "{weather}日には、遠くの山までよく見える。",
    "町の人は、隣町から来た客を温かく迎える。",
    "橋の上から見る{river}は、{season}が最も美しいと言われる。",
    "丘の上には小さな神社があり、{flower}の季節には多くの人が訪れる。",
    "港へ向かう道には、{shop}と{shop2}が並んでいる。",
]
_SEASONS = ["春", "夏", "秋", "冬"]
_SHOPS = [
    "豆腐屋",
    "本屋",
    "花屋",
    "パン屋",
    "床屋",
    "茶店",
    "時計店",
    "文房具屋",
    "魚屋",
    "八百屋",
    "和菓子屋",
    "写真館",
]
_WEATHER = ["よく晴れた", "雨上がりの", "風のない", "空気の澄んだ", "霧の晴れた"]


def town_fields(world: World, town: Town) -> dict[str, str]:
    """Everything that templates say of a town; neighbours beyond the edge of the map are absent."""
    sides = {"east": (1, 0), "west": (-1, 0), "north": (0, -1), "south": (0, 1)}
    fields = {
        "t": f"{town.name.ja}町",
        "kana": f"{town.name.kana}まち",
        "river": town.river.name.ja,
        "river_kana": town.river.name.kana,
        "length": str(town.river.length),
        "pop": f"{town.population:,}",
        "founded": str(town.founded),
        "spec": town.speciality.ja,
        "flower": town.flower.ja,
        "fest": town.festival.ja,
        "month": str(town.month),
        "mayor": world.people[town.mayor].name.ja,
        "mayor_kana": world.people[town.mayor].name.kana,
    }
    for side, step in sides.items():
        if (other := world.neighbour(town, *step)) is not None:
            fields[side] = f"{other.name.ja}町"
    return fields


def person_fields(world: World, person: Person) -> dict[str, str]:
    """Everything that templates say of a person, and of the home town under its own names."""
    return {
        **town_fields(world, world.towns[person.home]),
        "p": person.name.ja,
        "p_kana": person.name.kana,
        "born": str(person.born),
        "job": person.job.ja,
        "hobby": person.hobby.ja,
        "home": f"{world.towns[person.home].name.ja}町",
        "birthplace": f"{world.towns[person.birthplace].name.ja}町",
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
    return "".join(fact(kind, fields, rng) for kind in rng.sample(kinds, rng.randrange(2, 6)))


def town_article(world: World, town: Town, rng: Random) -> str:
    """An encyclopaedia article of several paragraphs, with every fact."""
    fields = town_fields(world, town)
    sides = [side for side in _SIDES if side in fields]
    rng.shuffle(sides)
    colour = scenes(fields, rng, 3)
    opening = "{t}（{kana}）は、{river}（{river_kana}）のほとりにある町である。" + rng.choice(
        ["", "{spec}と{fest}で知られる。", "人口は{pop}人。", "町の花は{flower}。"]
    )
    land = [fact("river", fields, rng), *(fact(side, fields, rng) for side in sides), colour[0]]
    history = [fact("founded", fields, rng), _anniversary(town, fields, rng), fact("population", fields, rng)]
    life = [
        fact("speciality", fields, rng),
        fact("flower", fields, rng),
        fact("festival", fields, rng),
        colour[1],
    ]
    rule = [fact("mayor", fields, rng), _mayor_life(world, town, rng), colour[2]]
    people = [person for person in world.residents(town) if person is not world.people[town.mayor]]
    if people:
        known = rng.choice(people)
        rule.append("{p}（{p_kana}）も{home}の住民で、職業は{job}である。".format_map(person_fields(world, known)))
    sections = [("地理", land), ("歴史", history), ("暮らし", life), ("町政と人々", rule)]
    rng.shuffle(sections)
    headed = rng.random() < 0.5
    paragraphs = [(f"{title}\n" if headed else "") + "".join(sentences) for title, sentences in sections]
    title = f"{fields['t']}\n\n" if headed else ""
    return title + opening.format_map(fields) + "\n\n" + "\n\n".join(paragraphs)


def town_journey(world: World, town: Town, rng: Random) -> str:
    """A travel diary through two or three neighbouring towns."""
    season = rng.choice(_SEASONS)
    friend = rng.choice(["友人", "妹", "兄", "母", "祖父", "同僚", "娘"])
    here, text = town, [f"{season}の{rng.choice(['日曜日', '土曜日', '休日', '連休'])}、{friend}と旅に出た。"]
    for stop in range(rng.randrange(2, 4)):
        fields = town_fields(world, here)
        arrive = "まず向かったのは{t}である。" if stop == 0 else "やがて{t}に着いた。"
        told = rng.sample(["mayor", "river", "speciality", "population", "founded", "flower", "festival"], 3)
        meal = rng.choice(["宿の主人に{t}の話を聞いた。", "駅の案内板を読んだ。", "町の資料館に立ち寄った。"])
        buy = rng.choice(
            ["土産に{spec}を買った。", "{friend}は{spec}がすっかり気に入ったようだ。", "{river}の岸で弁当を食べた。"]
        )
        parts = [arrive, meal, *(fact(kind, fields, rng) for kind in told), *scenes(fields, rng), buy]
        text.append("".join(part.format_map({**fields, "friend": friend}) for part in parts))
        options = [(s, w) for s, w in _WAYS.items() if s in fields]
        side, (dx, dy, way) = rng.choice(options)
        there = world.neighbour(here, dx, dy)
        assert there is not None
        text.append(
            rng.choice(["{t}を出て、{way}へ進んだ。", "次の町を目指し、{t}から{way}へ歩いた。"]).format(
                t=fields["t"], way=way
            )
        )
        here = there
        assert f"{here.name.ja}町" == fields[side]
    text[-1] = rng.choice(
        ["夕方の列車で家に帰った。", "忘れられない一日になった。", "また来ようと約束して、帰りの列車に乗った。"]
    )
    return "\n".join(text)


def towns_compared(world: World, town: Town, rng: Random) -> str:
    """Two towns side by side, with the sums that follow from their numbers."""
    other = rng.choice([place for place in world.towns if place is not town])
    one, two = town_fields(world, town), town_fields(world, other)
    more, less = (town, other) if town.population > other.population else (other, town)
    older, younger = (town, other) if town.founded < other.founded else (other, town)
    lines = [
        f"{one['t']}と{two['t']}を比べてみよう。",
        f"{one['t']}の人口は{one['pop']}人、{two['t']}の人口は{two['pop']}人である。"
        f"人口が多いのは{more.name.ja}町で、その差は{more.population - less.population:,}人である。",
    ]
    if older.founded != younger.founded:
        lines.append(
            f"{older.name.ja}町が開かれたのは{older.founded}年、{younger.name.ja}町が開かれたのは{younger.founded}年である。"
            f"{older.name.ja}町のほうが{younger.founded - older.founded}年古い。"
        )
    if town.river is other.river:
        lines.append(f"どちらの町にも{one['river']}が流れている。")
    else:
        lines.append(f"{one['t']}を流れる川は{one['river']}、{two['t']}を流れる川は{two['river']}である。")
    kind = rng.choice(["mayor", "speciality", "flower", "festival"])
    lines.append(fact(kind, one, rng) + "一方、" + fact(kind, two, rng))
    return "\n".join(lines)


def person_note(world: World, person: Person, rng: Random) -> str:
    """Two to four facts about a person."""
    fields = person_fields(world, person)
    return "".join(
        fact(kind, fields, rng) for kind in rng.sample(["born", "job", "home", "hobby"], rng.randrange(2, 5))
    )


def person_article(world: World, person: Person, rng: Random) -> str:
    """A life in three or four paragraphs."""
    fields = person_fields(world, person)
    of = "{home}の" if person.job is MAYOR else "{home}に住む"
    opening = ("{p}（{p_kana}、{born}年生まれ）は、" + of + "{job}である。").format_map(fields)
    youth = [fact("born", fields, rng), _school(person, rng), fact("hobby", fields, rng)]
    work = [fact("job", fields, rng), _career(person, rng), *scenes(fields, rng)]
    place = [fact("home", fields, rng)]
    place += [
        fact(kind, fields, rng) for kind in rng.sample(["river", "speciality", "flower", "festival", "population"], 2)
    ]
    neighbours = [other for other in world.residents(world.towns[person.home]) if other is not person]
    if neighbours:
        friend = rng.choice(neighbours)
        place.append(
            f"同じ町に住む{friend.name.ja}とは、{rng.choice([friend.hobby.ja, person.hobby.ja])}を通じて親しくなった。"
        )
    paragraphs = [opening, "".join(youth), "".join(work), "".join(place)]
    if rng.random() < 0.5:
        paragraphs.append(_words(person, rng))
    return "\n\n".join(paragraphs)


def dialogue(world: World, person: Person, rng: Random) -> str:
    """Two people meet, introduce themselves and talk about their towns."""
    other = rng.choice([somebody for somebody in world.people if somebody is not person])
    lines = []
    for speaker, partner in ((person, other), (other, person)):
        me, you = person_fields(world, speaker), partner.name.ja
        lines += [
            rng.choice(
                [
                    "はじめまして。{p}と申します。{home}で{job}をしています。",
                    "こんにちは。{home}に住む{p}です。職業は{job}です。",
                ]
            ),
            rng.choice(["{home}はどんな町ですか。", "{home}のことを教えてください。", "{home}には何がありますか。"]),
            rng.choice(
                [
                    "{river}が流れる静かな町で、名産は{spec}です。",
                    "人口{pop}人の町で、{month}月の{fest}がにぎやかですよ。",
                    "{founded}年に開かれた町で、{flower}がとてもきれいです。",
                ]
            ),
            rng.choice(["お生まれはいつですか。", "ご出身はどちらですか。"]),
            "{born}年に{birthplace}で生まれました。趣味は{hobby}です。",
        ]
        speakers = [speaker.name.ja, you, speaker.name.ja, you, speaker.name.ja]
        lines[-5:] = [f"{name}「{line.format_map(me)}」" for name, line in zip(speakers, lines[-5:], strict=True)]
    farewell = rng.choice(
        ["またお会いしましょう。", "今度、ぜひ遊びに来てください。", "今日はありがとうございました。"]
    )
    lines.append(f"{person.name.ja}「{farewell}」")
    return "\n".join(lines)


_SIDES = ("east", "west", "north", "south")
_TOWN_KINDS = ("mayor", "river", "speciality", "population", "founded", "flower", "festival", *_SIDES)
_WAYS = {"east": (1, 0, "東"), "west": (-1, 0, "西"), "north": (0, -1, "北"), "south": (0, 1, "南")}


def _anniversary(town: Town, fields: dict[str, str], rng: Random) -> str:
    years = rng.choice([50, 100, 150, 200, 300])
    return (
        f"開かれてから{years}年目に当たる{town.founded + years}年には、{fields['flower']}が{years}本植えられた。"
        if (town.founded + years <= 2020)
        else "古い家並みは、今も大切に守られている。"
    )


def _mayor_life(world: World, town: Town, rng: Random) -> str:
    fields = person_fields(world, world.people[town.mayor])
    return rng.choice(
        [
            "{mayor}（{mayor_kana}）は{born}年に{birthplace}で生まれた。",
            "町長の趣味は{hobby}だという。",
            "{mayor}は{born}年生まれである。",
        ]
    ).format_map(fields)


def _school(person: Person, rng: Random) -> str:
    age = rng.choice([6, 12, 15, 18])
    what = {6: "小学校に入った", 12: "小学校を卒業した", 15: "中学校を卒業した", 18: "高校を卒業した"}[age]
    return f"{person.born + age}年、{age}歳で{what}。"


def _career(person: Person, rng: Random) -> str:
    age, year = person.began, person.born + person.began
    return rng.choice(
        [
            f"{person.job.ja}になったのは{year}年、{age}歳のときである。",
            f"{year}年に{age}歳を迎え、この年に{person.job.ja}となった。",
        ]
    )


def _words(person: Person, rng: Random) -> str:
    age = rng.randrange(32, min(60, 2026 - person.born))
    said = rng.choice(
        [
            "毎日が勉強です",
            "この町の人に支えられてきました",
            "まだやりたいことがたくさんあります",
            "続けることが大切です",
        ]
    )
    return f"{person.born + age}年、{age}歳になった{person.name.ja}は、「{said}」と語った。"

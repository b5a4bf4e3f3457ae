"""The invented world of the demo corpus: towns on a map, rivers, people, all facts fixed by one seed.

Every name exists in Japanese and in English, so that one fact can be asked in both languages. Towns lie on a grid; a
river flows along each column, so neighbours and rivers agree everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

WIDTH, DEPTH = 8, 6  # towns from west to east, and from north to south
PEOPLE_PER_TOWN = 4


@dataclass(frozen=True)
class Name:
    """A name or noun in both languages; `kana` is the reading of the Japanese one, empty where nobody needs it."""

    ja: str
    en: str
    kana: str = ""


@dataclass(frozen=True)
class River:
    """A river; `length` in kilometres."""

    name: Name
    length: int


@dataclass(frozen=True)
class Town:
    """A town at column `x` (from the west) and row `y` (from the north).

    `festival` is held in month `month`; `founded` is a year; `mayor` an index into `World.people`.
    """

    name: Name
    x: int
    y: int
    river: River
    population: int
    founded: int
    speciality: Name
    flower: Name
    festival: Name
    month: int
    mayor: int


@dataclass(frozen=True)
class Person:
    """A person; `home` and `birthplace` are indices into `World.towns`. English names put the given name first.

    `began` is the age at which the job was taken up, always by the year 2020.
    """

    name: Name
    given_en: str
    female: bool
    born: int
    job: Name
    began: int
    hobby: Name
    home: int
    birthplace: int


@dataclass(frozen=True)
class World:
    """All towns, row by row from the north-west, and people."""

    towns: tuple[Town, ...]
    people: tuple[Person, ...]
    width: int = WIDTH
    depth: int = DEPTH

    def neighbour(self, town: Town, dx: int, dy: int) -> Town | None:
        """The town so many steps to the east and south, or None beyond the edge of the map."""
        x, y = town.x + dx, town.y + dy
        return self.towns[y * self.width + x] if 0 <= x < self.width and 0 <= y < self.depth else None

    def residents(self, town: Town) -> list[Person]:
        """The people who live in a town, its mayor among them."""
        index = town.y * self.width + town.x
        return [person for person in self.people if person.home == index]


def largest_world() -> tuple[int, int]:
    """How many rivers, and so towns from west to east, and how many towns there are names for."""
    return len(_RIVERS), len(_town_names())


def make_world(seed: int, width: int = WIDTH, depth: int = DEPTH) -> World:
    """The world of a seed and size: 8 x 6 towns have 8 rivers and 192 people; the same on every machine."""
    rng = Random(f"world/{seed}")
    rivers = [River(name, rng.randrange(24, 180)) for name in rng.sample(_RIVERS, width)]
    names = rng.sample(_town_names(), width * depth)
    populations = rng.sample(range(32, 980), width * depth)
    people = _people(rng, len(names))
    towns = []
    for index, name in enumerate(names):
        month = rng.randrange(1, 13)
        towns.append(
            Town(
                name=name,
                x=index % width,
                y=index // width,
                river=rivers[index % width],
                population=populations[index] * 100,
                founded=rng.randrange(1603, 1956),
                speciality=rng.choice(_SPECIALITIES),
                flower=rng.choice(_FLOWERS),
                festival=rng.choice(_FESTIVALS[(month % 12) // 3]),
                month=month,
                mayor=index,
            )
        )
    return World(tuple(towns), tuple(people), width, depth)


def _town_names() -> list[Name]:
    """All town names: a poetic first part and a landscape, without the few that exist."""
    return [
        Name(first.ja + second.ja, first.en + second.en, first.kana + second.kana)
        for first in _TOWN_FIRST
        for second in _TOWN_SECOND
        if first.ja + second.ja not in _REAL_TOWNS
    ]


def _people(rng: Random, num_towns: int) -> list[Person]:
    """People 0 .. num_towns - 1 are the mayors of their towns; full names are unique."""
    pairs = rng.sample([(s, g, f) for s in _SURNAMES for g, f in _given()], PEOPLE_PER_TOWN * num_towns)
    people = []
    for index, (surname, given, female) in enumerate(pairs):
        is_mayor = index < num_towns
        people.append(
            Person(
                name=Name(surname.ja + given.ja, f"{given.en} {surname.en}", f"{surname.kana} {given.kana}"),
                given_en=given.en,
                female=female,
                born=rng.randrange(1940, 1976 if is_mayor else 1991),
                job=MAYOR if is_mayor else rng.choice(_JOBS),
                began=rng.randrange(36, 46) if is_mayor else rng.randrange(24, 31),
                hobby=rng.choice(_HOBBIES),
                home=index if is_mayor else rng.randrange(num_towns),
                birthplace=rng.randrange(num_towns),
            )
        )
    return people


def _given() -> list[tuple[Name, bool]]:
    return [(name, True) for name in _WOMEN] + [(name, False) for name in _MEN]


def _names(table: str) -> list[Name]:
    """Reads `漢字 reading English` items, separated by commas; the reading may be `-`."""
    items = [item.split(maxsplit=2) for item in table.replace("\n", " ").split(",") if item.strip()]
    return [Name(ja, en, "" if kana == "-" else kana) for ja, kana, en in items]


MAYOR = Name("町長", "mayor", "ちょうちょう")

_TOWN_FIRST = _names(
    "星 ほし Hoshi, 月 つき Tsuki, 霧 きり Kiri, 風 かざ Kaza, 雲 くも Kumo, 虹 にじ Niji, 露 つゆ Tsuyu, "
    "霞 かすみ Kasumi, 朝 あさ Asa, 夕 ゆう Yu, 暁 あかつき Akatsuki, 雪 ゆき Yuki, 鈴 すず Suzu, "
    "鐘 かね Kane, 琴 こと Koto, 笛 ふえ Fue, 絹 きぬ Kinu, 錦 にしき Nishiki, 翠 みどり Midori, "
    "灯 あかり Akari"
)
_TOWN_SECOND = _names(
    "沢 ざわ zawa, 野 の no, 原 はら hara, 浜 はま hama, 崎 ざき zaki, 森 もり mori, 丘 おか oka, 瀬 せ se, "
    "里 ざと zato, 坂 ざか zaka, 浦 うら ura, 峰 みね mine, 橋 ばし bashi, 沼 ぬま numa, 泉 いずみ izumi"
)
_REAL_TOWNS = {"琴浦", "月野", "星野", "朝原", "夕浦", "鈴原", "錦沢", "雪沢", "風浦", "霧峰", "朝野", "錦野", "絹橋"}
_RIVERS = _names(
    "瑠璃川 るりがわ Ruri River, 珊瑚川 さんごがわ Sango River, 真珠川 しんじゅがわ Shinju River, "
    "水晶川 すいしょうがわ Suisho River, 翡翠川 ひすいがわ Hisui River, 銀鈴川 ぎんれいがわ Ginrei River, "
    "朧川 おぼろがわ Oboro River, 蛍火川 ほたるびがわ Hotarubi River, 白菊川 しらぎくがわ Shiragiku River, "
    "木霊川 こだまがわ Kodama River, 陽炎川 かげろうがわ Kagero River, 花筏川 はないかだがわ Hanaikada River"
)
_SPECIALITIES = _names(
    "みかん - mandarin oranges, りんご - apples, 緑茶 - green tea, そば - buckwheat noodles, 牡蠣 - oysters, "
    "味噌 - miso, 豆腐 - tofu, 和紙 - handmade paper, 陶器 - pottery, 絹織物 - silk cloth, はちみつ - honey, "
    "梅干し - pickled plums, 栗 - chestnuts, 桃 - peaches, わかめ - seaweed, 醤油 - soy sauce, "
    "ぶどう - grapes, 柿 - persimmons, いちご - strawberries, 漆器 - lacquerware, 風鈴 - wind chimes, "
    "和菓子 - sweets, しいたけ - mushrooms, チーズ - cheese, 木彫りの人形 - wooden dolls, 団扇 - paper fans, "
    "藍染め - indigo cloth, 竹細工 - bamboo baskets, 干物 - dried fish, ろうそく - candles"
)
_FLOWERS = _names(
    "桜 - cherry blossoms, 梅 - plum blossoms, 藤 - wisteria, つつじ - azaleas, 菖蒲 - irises, "
    "紫陽花 - hydrangeas, ひまわり - sunflowers, 朝顔 - morning glories, 桔梗 - bellflowers, "
    "菊 - chrysanthemums, コスモス - cosmos flowers, 椿 - camellias, 水仙 - daffodils, "
    "菜の花 - rape blossoms, すみれ - violets, 百合 - lilies"
)
# By season: winter (December to February), spring, summer, autumn.
_FESTIVALS = [
    _names(
        "雪灯籠祭り - Snow Lantern Festival, 火祭り - Fire Festival, 初市祭り - First Market Festival, "
        "氷祭り - Ice Festival"
    ),
    _names(
        "花祭り - Flower Festival, 凧揚げ祭り - Kite Festival, 田植え祭り - Rice Planting Festival, "
        "若葉祭り - Young Leaf Festival"
    ),
    _names(
        "川祭り - River Festival, 七夕祭り - Star Festival, 灯籠流し - Floating Lantern Festival, "
        "太鼓祭り - Drum Festival"
    ),
    _names(
        "月見祭り - Moon Viewing Festival, 収穫祭 - Harvest Festival, 紅葉祭り - Red Leaf Festival, "
        "新米祭り - New Rice Festival"
    ),
]
_JOBS = _names(
    "医師 - doctor, 小学校の教師 - schoolteacher, 漁師 - fisher, 大工 - carpenter, 画家 - painter, "
    "陶芸家 - potter, 料理人 - cook, 司書 - librarian, 看護師 - nurse, 農家 - farmer, 駅長 - stationmaster, "
    "作曲家 - composer, パン職人 - baker, 天文学者 - astronomer, 庭師 - gardener, 写真家 - photographer, "
    "時計職人 - watchmaker, 郵便配達員 - letter carrier, 船長 - ship captain, 獣医 - veterinarian, "
    "薬剤師 - pharmacist, 記者 - reporter, 仕立屋 - tailor, 豆腐職人 - tofu maker"
)
_HOBBIES = _names(
    "将棋 - shogi, 釣り - fishing, 登山 - mountain climbing, 読書 - reading, 写真 - photography, "
    "合唱 - choir singing, 園芸 - gardening, 囲碁 - the game of go, 茶道 - the tea ceremony, 俳句 - haiku, "
    "水泳 - swimming, 書道 - calligraphy, 天体観測 - stargazing, 折り紙 - origami, 散歩 - long walks, "
    "尺八 - the bamboo flute"
)
_SURNAMES = _names(
    "佐藤 さとう Sato, 鈴木 すずき Suzuki, 高橋 たかはし Takahashi, 田中 たなか Tanaka, 伊藤 いとう Ito, "
    "渡辺 わたなべ Watanabe, 山本 やまもと Yamamoto, 中村 なかむら Nakamura, 小林 こばやし Kobayashi, "
    "加藤 かとう Kato, 吉田 よしだ Yoshida, 山田 やまだ Yamada, 松本 まつもと Matsumoto, "
    "井上 いのうえ Inoue, 木村 きむら Kimura, 清水 しみず Shimizu, 林 はやし Hayashi, 斎藤 さいとう Saito, "
    "池田 いけだ Ikeda, 橋本 はしもと Hashimoto, 石川 いしかわ Ishikawa, 前田 まえだ Maeda, "
    "藤井 ふじい Fujii, 岡田 おかだ Okada, 長谷川 はせがわ Hasegawa, 村上 むらかみ Murakami, "
    "近藤 こんどう Kondo, 坂本 さかもと Sakamoto, 遠藤 えんどう Endo, 青木 あおき Aoki, "
    "西村 にしむら Nishimura, 福田 ふくだ Fukuda, 三浦 みうら Miura, 原田 はらだ Harada, "
    "松田 まつだ Matsuda, 中川 なかがわ Nakagawa"
)
_WOMEN = _names(
    "春香 はるか Haruka, 美咲 みさき Misaki, 葵 あおい Aoi, 千代 ちよ Chiyo, 由美 ゆみ Yumi, "
    "恵子 けいこ Keiko, 文子 ふみこ Fumiko, さくら さくら Sakura, 直美 なおみ Naomi, 京子 きょうこ Kyoko, "
    "真理 まり Mari, 菜月 なつき Natsuki, 静 しずか Shizuka, 綾乃 あやの Ayano, 小百合 さゆり Sayuri, "
    "智子 ともこ Tomoko, 雪乃 ゆきの Yukino, かおり かおり Kaori"
)
_MEN = _names(
    "健一 けんいち Kenichi, 大輔 だいすけ Daisuke, 翔太 しょうた Shota, 誠 まこと Makoto, 浩 ひろし Hiroshi, "
    "隆 たかし Takashi, 茂 しげる Shigeru, 正雄 まさお Masao, 和也 かずや Kazuya, 拓海 たくみ Takumi, "
    "三郎 さぶろう Saburo, 秀樹 ひでき Hideki, 悟 さとる Satoru, 一郎 いちろう Ichiro, 修 おさむ Osamu, "
    "勇 いさむ Isamu, 徹 とおる Toru, 光 ひかる Hikaru"
)

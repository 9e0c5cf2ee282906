r"""Public data sets in their published form: small made-up files of exactly their form, and the values in them.

Where each form is described:
- MovieLens: https://files.grouplens.org/datasets/movielens/ml-latest-small-README.html
- Amazon Reviews 2023: the data fields of https://huggingface.co/datasets/McAuley-Lab/Amazon-Reviews-2023
- RetailRocket: the description at https://www.kaggle.com/datasets/retailrocket/ecommerce-dataset
- MIND: https://github.com/msnews/msnews.github.io/blob/master/assets/doc/introduction.md
- KuaiRec: https://github.com/chongminggao/KuaiRec
- MicroLens: https://github.com/westlake-repl/MicroLens, Code/IDRec/process_data.ipynb
- PixelRec: https://github.com/westlake-repl/PixelRec, dataset/readme.md
- H&M: https://www.kaggle.com/competitions/h-and-m-personalized-fashion-recommendations/data
- Yoochoose: dataset-README.txt in the archive of http://2015.recsyschallenge.com/challenge.html
"""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from notellm2_core.config.load import load_config
from notellm2_core.config.source import SourceSettings
from notellm2_core.notes.source_reader import read_note_table
from notellm2_core.tables.source import open_events, open_notes, used_by
from notellm2_core.tables.table import MALFORMED

CONFIGS = Path("pipelines/configs/datasets")

# A byte order mark, CRLF, commas and quotes in titles, a film without genres and one without tags.
MOVIELENS = {
    "movies.csv": '\ufeffmovieId,title,genres\r\n7,"Lamp, The (Lampe, La) (1951)",Comedy|Film-Noir\r\n'
    '8,"""Red"" Kite (1999)",(no genres listed)\r\n',
    "tags.csv": "userId,movieId,tag,timestamp\r\n3,7,slow,1445714994\r\n4,7,Comedy,1445714995\r\n"
    '4,7,"quiet, blue",1445714996\r\n',
    "ratings.csv": "userId,movieId,rating,timestamp\r\n3,7,4.5,964982703\r\n3,8,0.5,964981247\r\n",
}  # fmt: skip

# Nested values that differ from row to row, prices of several types, an id with leading zeros, escaped letters.
AMAZON = {
    "meta_All_Beauty.jsonl.gz": [
        {"main_category": "All Beauty", "title": "Soap, caf\u00e9", "average_rating": 4.8, "rating_number": 10,
         "features": ["Round", "Mild"], "description": [], "price": None, "videos": [], "store": "Acme",
         "images": [{"thumb": "https://m/1._SS40_.jpg", "large": "https://m/1.jpg", "variant": "MAIN", "hi_res": None}],
         "categories": [], "details": {"UPC": "617"}, "parent_asin": "B01", "bought_together": None},
        {"main_category": None, "title": "A book", "average_rating": 3.0, "rating_number": 1, "features": [],
         "description": ["Long.", "Old."], "price": "from 3.99", "images": [], "store": None, "subtitle": "Paperback",
         "videos": [{"title": "v", "url": "https://m/v", "user_id": ""}], "categories": ["Books", "Tea & Coffee"],
         "details": {"Best Sellers Rank": {"Books": 7}}, "parent_asin": "0001", "bought_together": None},
    ],
    "All_Beauty.jsonl.gz": [
        {"rating": 5.0, "title": "Good", "text": "Nice.<br />Yes", "images": [{"small_image_url": "https://m/s.jpg"}],
         "asin": "B00", "parent_asin": "B01", "user_id": "AGK", "timestamp": 1588687728923, "helpful_vote": 0,
         "verified_purchase": True},
        {"rating": 2.0, "title": "", "text": "", "images": [], "asin": "0001", "parent_asin": "0001",
         "user_id": "AGK", "timestamp": 976492800000, "helpful_vote": 3, "verified_purchase": False},
    ],
}  # fmt: skip

# Both parts have the header. Item 5 changes, and item 6 has no property except that it is there.
RETAILROCKET = {
    "item_properties_part1.csv": "timestamp,itemid,property,value\n1435460400000,5,categoryid,1338\n"
    "1441508400000,5,888,1116713 960601 n277.200\n1435460400000,6,available,1\n",
    "item_properties_part2.csv": "timestamp,itemid,property,value\n1442113200000,5,categoryid,1340\n"
    "1433041200000,5,available,0\n1442113200000,9,888,960601\n1435460400000,9,categoryid,1338\n",
    "category_tree.csv": "categoryid,parentid\n1338,213\n213,\n",
    "events.csv": "timestamp,visitorid,event,itemid,transactionid\n1433221332117,257,view,5,\n"
    "1433224214164,99,addtocart,9,\n1433221999827,99,transaction,9,234\n",
}

# No header and no quoting: titles begin with quotes, and entities are JSON. The same news twice, an empty history.
_KITE = 'N1\tnews\tnewsworld\t"Red" kite, 5\' long\tIt flies.\thttps://a/1.html\t[{"Label": "Kite"}]\t[]\n'
MIND = {
    "MINDsmall_train/news.tsv": _KITE + 'N2\thealth\tmedical\tTea"\t\thttps://a/2.html\t[]\t[]\n',
    "MINDsmall_dev/news.tsv": _KITE + "N3\tnews\tnewsus\tMoss\tGreen.\thttps://a/3.html\t[]\t\n",
    "MINDsmall_train/behaviors.tsv": "1\tU13\t11/11/2019 9:05:58 AM\tN8 N9\tN1-0 N2-1\n",
    "MINDsmall_dev/behaviors.tsv": "1\tU8\t11/15/2019 12:11:30 PM\t\tN3-1\n",
}

# Captions with line breaks and commas, one that breaks its row, UNKNOWN, lists without quotes.
KUAIREC = {
    "kuairec_caption_category.csv": "video_id,manual_cover_text,caption,topic_tag,first_level_category_id,"
    "first_level_category_name,second_level_category_id,second_level_category_name,third_level_category_id,"
    "third_level_category_name\n"
    '0,UNKNOWN,"茶, 茶\n第二行",[],8,颜值,673,颜值随拍,-124,UNKNOWN\n'
    '1,封面,,"[茶,红 茶]",27,高新数码,-124,UNKNOWN,-124,UNKNOWN\n'
    "2,UNKNOWN,half a\nrow, with, commas,[茶],5,美食,1,UNKNOWN,1,UNKNOWN\n",
    "big_matrix.csv": "user_id,video_id,play_duration,video_duration,time,date,timestamp,watch_ratio\n"
    "0,1,13838,10867,2020-07-05 00:08:23.438,20200705,1593878903.438,1.2733965215790926\n"
    "0,0,23665,10984,2020-07-05 00:13:41.297,20200705,1593879221.297,2.1544974\n"
    "0,1,3665,10984,2020-07-05 00:14:41,20200705,1593879281.0,0.33\n",
    "item_categories.csv": 'video_id,feat\n0,[8]\n1,"[27, 9]"\n',
}

MICROLENS = {
    "MicroLens-50k_titles.csv": 'item,title\n1,"Tea, with ""milk"""\n20,Moss\n',
    "MicroLens-50k_pairs.csv": "user,item,timestamp\n36121,20,1583378629552\n1,1,1662984132429\n",
}

# Counters are floats or empty; a description and a title may be missing, a tag may hold a comma.
PIXELREC = {
    "item_info.csv": "item_id,view_number,comment_number,thumbup_number,share_number,coin_number,favorite_number,"
    "barrage_number,title,tag,description\n"
    'i19,799668.0,739.0,8050.0,220.0,84.0,1049.0,510.0,"A turtle, two…","Pets, Dogs","Brush it? ""No"""\n'
    "i2,,,,,,,,Moss,,\n",
    "interaction.csv": "item_id,user_id,timestamp\ni19,u209,1605059546\ni2,u209,1628914341\n",
}

# Ids with leading zeros, an empty description, a comma in a name; two purchases of one article on a day.
_ARTICLE = (
    "article_id,product_code,prod_name,product_type_no,product_type_name,product_group_name,graphical_appearance_no,"
    "graphical_appearance_name,colour_group_code,colour_group_name,perceived_colour_value_id,"
    "perceived_colour_value_name,perceived_colour_master_id,perceived_colour_master_name,department_no,"
    "department_name,index_code,index_name,index_group_no,index_group_name,section_no,section_name,garment_group_no,"
    "garment_group_name,detail_desc\n"
)
HM = {
    "articles.csv": _ARTICLE
    + "0108775015,0108775,Top,253,Vest top,Garment Upper body,1010016,Solid,09,Black,4,Dark,5,Black,1676,Jersey,A,"
    "Ladieswear,1,Ladieswear,16,Womens Basics,1002,Jersey,Soft.\n"
    '0910065001,0910065,"Bra, 2 (Idro)",306,Bra,Underwear,1010016,Solid,10,White,4,Dark,5,White,1339,Clean,B,Tights,1,'
    'Ladieswear,61,Lingerie,1017,"Under-, Nightwear",\n',
    "transactions_train.csv": "t_dat,customer_id,article_id,price,sales_channel_id\n"
    "2018-09-20,00a1,0108775015,0.050830508474576264,2\n2018-09-20,00a1,0108775015,0.050830508474576264,2\n"
    "2018-09-21,00a1,0910065001,0.03049152542372881,1\n",
}

# Items have no table: the clicks name them. Categories: a special offer, none, a number, a brand.
YOOCHOOSE = {
    "yoochoose-clicks.dat": "1,2014-04-07T10:51:09.277Z,214,0\n1,2014-04-07T10:54:09.868Z,215,S\n"
    "2,2014-04-07T13:56:37.614Z,215,12\n11,2014-04-08T13:56:37.614Z,215,2089131454\n",
    "yoochoose-buys.dat": "1,2014-04-07T10:58:00.306Z,215,12462,1\n",
}

FILES: dict[str, dict[str, Any]] = {
    "movielens": MOVIELENS, "amazon_reviews_2023": AMAZON, "retailrocket": RETAILROCKET, "mind": MIND,
    "kuairec": KUAIREC, "microlens": MICROLENS, "pixelrec": PIXELREC, "hm": HM, "yoochoose": YOOCHOOSE,
}  # fmt: skip

# note_id -> title, topics, content, path of the image
NOTES: dict[str, dict[str, tuple[str, tuple[str, ...], str, str | None]]] = {
    "movielens": {
        "7": ("Lamp, The (Lampe, La) (1951)", ("Comedy", "Film-Noir", "slow", "quiet, blue"), "", None),
        "8": ('"Red" Kite (1999)', (), "", None),
    },
    "amazon_reviews_2023": {
        "B01": ("Soap, café", ("Acme",), "Round Mild", None),
        "0001": ("A book", ("Books", "Tea & Coffee"), "Long. Old.", None),
    },
    "retailrocket": {
        "5": ("", (), "1338 1116713 960601 n277.200 1340", None),
        "9": ("", (), "960601 1338", None),
    },
    "mind": {
        "N1": ("\"Red\" kite, 5' long", ("news", "newsworld"), "It flies.", None),
        "N2": ('Tea"', ("health", "medical"), "", None),
        "N3": ("Moss", ("news", "newsus"), "Green.", None),
    },
    "kuairec": {
        "0": ("茶, 茶\n第二行", ("颜值", "颜值随拍"), "", None),
        "1": ("", ("茶", "红 茶", "高新数码"), "封面", None),
    },
    "microlens": {
        "1": ('Tea, with "milk"', (), "", "MicroLens-50k_covers/1.jpg"),
        "20": ("Moss", (), "", "MicroLens-50k_covers/20.jpg"),
    },
    "pixelrec": {
        "i19": ("A turtle, two…", ("Pets, Dogs",), 'Brush it? "No"', "cover/i19.jpg"),
        "i2": ("Moss", (), "", "cover/i2.jpg"),
    },
    "hm": {
        "0108775015": ("Top", ("Vest top", "Garment Upper body", "Black", "Womens Basics"), "Soft.",
                       "images/010/0108775015.jpg"),
        "0910065001": ("Bra, 2 (Idro)", ("Bra", "Underwear", "White", "Lingerie"), "", "images/091/0910065001.jpg"),
    },
    "yoochoose": {"214": ("214", (), "", None), "215": ("215", ("S", "12", "2089131454"), "", None)},
}  # fmt: skip

# user_id, note_id, time in UTC, event
EVENTS: dict[str, list[tuple[str, str, str, str]]] = {
    "movielens": [("3", "7", "2000-07-30T18:45:03", "4.5"), ("3", "8", "2000-07-30T18:20:47", "0.5")],
    "amazon_reviews_2023": [
        ("AGK", "B01", "2020-05-05T14:08:48.923000", "5.0"), ("AGK", "0001", "2000-12-11T00:00:00", "2.0"),
    ],
    "retailrocket": [
        ("257", "5", "2015-06-02T05:02:12.117000", "view"), ("99", "9", "2015-06-02T05:50:14.164000", "addtocart"),
        ("99", "9", "2015-06-02T05:13:19.827000", "transaction"),
    ],
    "mind": [
        ("U13", "N1", "2019-11-11T09:05:58", "0"), ("U13", "N2", "2019-11-11T09:05:58", "1"),
        ("U8", "N3", "2019-11-15T12:11:30", "1"),
    ],
    "kuairec": [
        ("0", "1", "2020-07-04T16:08:23.438000", "watched"), ("0", "0", "2020-07-04T16:13:41.297000", "watched"),
        ("0", "0", "2020-07-04T16:13:41.297000", "liked"),
    ],
    "microlens": [
        ("36121", "20", "2020-03-05T03:23:49.552000", "comment"), ("1", "1", "2022-09-12T12:02:12.429000", "comment"),
    ],
    "pixelrec": [
        ("u209", "i19", "2020-11-11T01:52:26", "interaction"), ("u209", "i2", "2021-08-14T04:12:21", "interaction"),
    ],
    "hm": [
        ("00a1", "0108775015", "2018-09-20T00:00:00", "purchase"),
        ("00a1", "0108775015", "2018-09-20T00:00:00", "purchase"),
        ("00a1", "0910065001", "2018-09-21T00:00:00", "purchase"),
    ],
    "yoochoose": [
        ("1", "214", "2014-04-07T10:51:09.277000", "click"), ("1", "215", "2014-04-07T10:54:09.868000", "click"),
        ("2", "215", "2014-04-07T13:56:37.614000", "click"), ("11", "215", "2014-04-08T13:56:37.614000", "click"),
        ("1", "215", "2014-04-07T10:58:00.306000", "buy"),
    ],
}  # fmt: skip


def write_dataset(name: str, folder: Path) -> SourceSettings:
    """Write the files of a data set into `folder`. Returns how its configuration reads them."""
    for file, content in FILES[name].items():
        text = content if isinstance(content, str) else "".join(json.dumps(row) + "\n" for row in content)
        path = folder / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return load_config(CONFIGS / f"{name}.yaml").source


def test_every_configuration_of_a_data_set_is_tested() -> None:
    assert {path.stem for path in CONFIGS.iterdir()} == FILES.keys() == NOTES.keys() == EVENTS.keys()


@pytest.mark.parametrize("name", FILES)
def test_the_notes(name: str, tmp_path: Path) -> None:
    """Of KuaiRec's broken row, one half is malformed, and the other has no number as its id. All others are read."""
    reading = write_dataset(name, tmp_path)
    table = read_note_table(tmp_path, reading=reading)
    notes = {
        n.note.note_id: (n.note.title, n.note.topics, n.note.content, n.image) for n in table.notes(table.note_ids)
    }
    assert notes == NOTES[name]
    assert table.dropped == ({"malformed_row": 1} if name == "kuairec" else {})


@pytest.mark.parametrize("name", FILES)
def test_the_events(name: str, tmp_path: Path) -> None:
    """Each of them counts as a view or a click, or is ignored by its name."""
    reading = write_dataset(name, tmp_path)
    tables = open_events(tmp_path, reading)
    rows = [row for table in tables for split in table.splits() for b in table.read(split) for row in b.to_pylist()]
    assert [
        (r["user_id"], r["note_id"], r["timestamp"].replace(tzinfo=None).isoformat(), r["event"]) for r in rows
    ] == (EVENTS[name])
    assert not any(row[MALFORMED] for row in rows)
    assert {row["event"] for row in rows} <= {*reading.event_names}


@pytest.mark.parametrize("name", FILES)
def test_notes_and_events_depend_on_their_own_files(name: str, tmp_path: Path) -> None:
    """A log that grows leaves the notes alone, unless it holds them, as Yoochoose's clicks do."""
    reading = write_dataset(name, tmp_path)
    uses = {file: used_by(reading, reading, file) for file in FILES[name]}
    of_events = {str(file.relative_to(tmp_path)) for table in open_events(tmp_path, reading) for file in table.files}
    of_notes = {str(file.relative_to(tmp_path)) for file in open_notes(tmp_path, reading).files}
    assert {file for file, (_, events) in uses.items() if events} == of_events
    assert {file for file, (notes, _) in uses.items() if not notes} == of_events - of_notes

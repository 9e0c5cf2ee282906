"""The vocabulary of the demo world's notes.

A theme has fourteen phrases, of which a note has only a few. No two phrases of a theme share a word ("the ridge walk",
"steep switchbacks", "muddy boots"), so two notes of one theme often share none: matching words finds some related
notes, knowing what the words mean finds more. Some words occur in several themes with different meanings ("powder",
"project", "sleeves", "pedals", "film", "bowl").
"""

THEMES: dict[str, tuple[str, ...]] = {
    name: tuple(phrases.split(", "))
    for name, phrases in {
        "hiking": "the ridge walk, muddy boots, steep switchbacks, the summit cross, a mountain hut, trekking poles, "
        "blisters, loose scree, the valley below, waymarks, a heavy backpack, the alpine meadow, a rain shell, cairns",
        "sourdough": "a lively starter, flour and water, the oven spring, an open crumb, bulk fermentation, rye, a "
        "crackling crust, the banneton, slow proofing, dough hydration, scoring patterns, a warm loaf, levain, baking",
        "watercolour": "wet on wet, cold-pressed paper, a soft wash, granulating pigment, the round brush, cobalt, a "
        "loose sketch, masking fluid, plein air painting, blooms, a landscape study, burnt sienna, glazing, an easel",
        "budget travel": "hostel bunks, night trains, a cheap flight, street food stalls, hand luggage, border stamps, "
        "couch surfing, an itinerary, the old town, backpackers, a bus pass, free museums, jet lag, souvenirs",
        "indoor plants": "a new monstera leaf, root rot, bright windowsills, propagation jars, the watering can, "
        "ferns, potting soil, a pothos cutting, fungus gnats, terracotta, variegation, misting, a fiddle fig, "
        "succulents",
        "running": "a half marathon, tempo intervals, shin splints, my pace, carbon shoes, the starting line, a "
        "recovery jog, cadence, race bibs, the last kilometre, negative splits, energy gels, sprinting, heart zones",
        "yoga": "downward dog, a cork mat, sun salutations, breathing slowly, the warrior pose, tight hips, vinyasa, "
        "balance on one leg, flexibility, savasana, my teacher in the studio, twists, headstands, mindfulness",
        "coffee": "a flat white, freshly roasted beans, the grinder, latte art, espresso, a pour-over, crema, light "
        "roast, the barista, a moka pot, milk foam, cold brew, acidity, arabica",
        "cats": "a purring kitten, whiskers, the scratching post, zoomies at night, soft paws, a cardboard box, "
        "litter, the tabby, catnip, hairballs, meowing, a windowsill nap, feline manners, the cat tree",
        "dogs": "a muddy puppy, the leash, fetch in the park, a wagging tail, recall training, barking, the retriever, "
        "chewed slippers, treats, a rescue hound, the vet, walkies, belly rubs, the kennel",
        "knitting": "merino yarn, circular needles, a cable sweater, dropped stitches, purl rows, the ribbing, wool "
        "socks, casting on, a chunky scarf, gauge swatches, skeins, raglan sleeves, blocking, crochet",
        "cycling": "gravel roads, clipless pedals, a flat tyre, the peloton, handlebar tape, a steep climb, watts, the "
        "derailleur, bib shorts, a century ride, the chainring, disc brakes, coasting downhill, my road bike",
        "street photography": "a prime lens, golden hour, black and white film, candid strangers, shutter speed, "
        "grain, the darkroom, zone focusing, reflections, a rangefinder, composition, high contrast, negatives, bokeh",
        "stargazing": "the milky way, a small telescope, saturn's rings, meteor showers, dark skies, orion, long "
        "exposure, the lunar eclipse, nebulae, light pollution, a star chart, jupiter, constellations, the eyepiece",
        "vegetable garden": "tomato seedlings, raised beds, compost, slugs, the first courgettes, mulch, crop "
        "rotation, a greenhouse, runner beans, digging potatoes, seed packets, pruning, the harvest, weeds",
        "cakes": "vanilla sponge, buttercream, a piping bag, layers, chocolate ganache, sprinkles, fondant flowers, "
        "meringue, cupcakes, icing sugar, a birthday tower, egg whites, frosting, the springform tin",
        "ramen": "tonkotsu broth, a soft egg, noodles, chashu, miso paste, nori sheets, spring onions, chili oil, a "
        "steaming bowl, dashi, bamboo shoots, slurping, kombu, umami",
        "skincare": "retinol, sunscreen, a gentle cleanser, dry patches, hyaluronic serum, the moisture barrier, "
        "niacinamide, acne, moisturiser, sheet masks, toner, pores, exfoliating acids, a glowing complexion",
        "thrift fashion": "vintage denim, a second-hand blazer, the flea market, corduroy, oversized knitwear, "
        "outfits, leather loafers, charity shops, upcycling, silk blouses, my wardrobe, hemming trousers, retro "
        "prints, a trench",
        "tidy home": "decluttering, storage baskets, an empty drawer, minimalism, folding shirts, the pantry, labels, "
        "donation bags, a clean countertop, shelves, vacuuming, spring cleaning, a capsule closet, hooks by the door",
        "saving money": "an emergency fund, index funds, the monthly budget, cutting subscriptions, compound interest, "
        "debt, a spending diary, cash envelopes, pensions, frugality, side income, my bank, taxes, dividends",
        "languages": "spanish verbs, flashcards, a strong accent, irregular grammar, my tandem partner, vocabulary, "
        "subtitles, pronunciation, kanji, the subjunctive, fluency, a phrasebook, tongue twisters, bilingual jokes",
        "piano": "chopin, scales in both hands, a waltz, sheet music, the metronome, arpeggios, black keys, sight "
        "reading, the sustain pedal, a recital, chords, an old upright, etudes, jazz voicings",
        "guitar": "fingerpicking, barre chords, new strings, an overdriven amp, blues licks, the capo, open mic, a "
        "slow riff, calluses, strumming, the fretboard, a vintage telecaster, effects pedals, perfect pitch",
        "board games": "worker placement, dice, a legacy campaign, the rulebook, meeples, bluffing, cooperative play, "
        "victory points, card sleeves, settlers, a tabletop evening, expansions, hidden roles, dungeon tiles",
        "novels": "an unreliable narrator, chapter one, the plot twist, a paperback, my reading list, protagonists, "
        "the library, literary fiction, a cosy mystery, bookmarks, prose, dog-eared pages, the author, a cliffhanger",
        "cinema": "a director's cut, the final scene, arthouse, subtle acting, the soundtrack, popcorn, a matinee, "
        "screenplays, slow camera pans, horror sequels, film noir, the premiere, a trilogy, costume design",
        "pottery": "stoneware clay, throwing on the wheel, glaze, the kiln, a lopsided mug, trimming, pinch bowls, "
        "handles, bisque firing, celadon, porcelain, centring, slip, a raku vase",
        "woodworking": "dovetail joints, a hand plane, walnut boards, sawdust, clamps, the workbench, chisels, oak, "
        "sanding, a mortise, linseed oil, the table saw, a bookcase build, veneer",
        "surfing": "offshore wind, a longboard, the lineup, duck diving, wax, clean swell, a wetsuit, reef break, the "
        "pop-up, low tide, paddling out, barrels, wipeouts, salty hair",
        "climbing": "chalk, a crimpy boulder, the belay, finger strength, slab, quickdraws, the crux, a harness, "
        "sending the project, overhangs, rope drag, beta, tight rubber shoes, the hangboard",
        "skiing": "fresh powder, the chairlift, carving turns, a black run, goggles, apres, moguls, avalanche beacons, "
        "ski boots, piste maps, slalom, snowploughs, a gondola, cold toes",
        "birdwatching": "binoculars, a goldfinch, the feeder, dawn chorus, migrating geese, a hide by the marsh, owls, "
        "plumage, the field guide, kingfishers, nest boxes, warblers, a rare heron, wingspan",
        "beekeeping": "the hive, a queen, raw honey, the smoker, brood frames, swarming, varroa mites, nectar, drones, "
        "clover, a veil and gloves, beeswax, pollen, the apiary",
        "tea": "oolong, a gongfu session, first flush, the kettle, loose leaves, matcha whisking, a clay pot, "
        "darjeeling, steeping, jasmine, earl grey, tannins, pu-erh cakes, the infuser",
        "barbecue": "brisket, charcoal, a dry rub, hickory smoke, ribs, the grill, tongs, pulled pork, marinade, "
        "glowing embers, burgers, sausages, corn cobs, sear marks",
        "nail art": "gel polish, cuticles, french tips, chrome powder, almond shape, the lamp, glitter, press-ons, a "
        "topcoat, acrylics, filing, tiny decals, nude shades, a manicure",
        "new baby": "nappies, a lullaby, the pram, teething, sleepless nights, the midwife, first smile, "
        "breastfeeding, swaddling, tiny socks, the crib, burping, crawling, maternity leave",
        "exam study": "revision notes, a highlighter, the library desk, past papers, procrastination, lectures, "
        "pomodoro timers, memorising, my thesis, finals, deadlines, mind maps, a group project, tutors",
        "meditation": "sitting still, a cushion, wandering thoughts, incense, guided sessions, a silent retreat, "
        "mantras, inner calm, gratitude, the singing bowl, letting go, stress relief, body scans, awareness",
    }.items()
}

# Shared by all themes: they carry no signal, and mislead methods that count matching words.
TITLES = (
    "{a}, finally", "notes on {a}", "my honest view of {a}", "what nobody told me about {a}", "{a} and {b}",
    "a small story about {a}", "thinking about {a} again", "{a} for beginners", "one week of {a}", "why I love {a}",
    "{a}: yes or no?", "hello from me and {a}", "my weekend project", "three things I learned", "progress, slowly",
    "a good day", "questions for all of you", "small wins of the week",
)  # fmt: skip
SENTENCES = (
    "Today it was all about {a}.", "I never thought {a} would make me this happy.", "Still learning about {a}.",
    "It started with {a} and ended with {b}.", "A friend asked me about {a}, so here we go.", "First {a}, then {b}.",
    "Does anybody else struggle with {a}?", "For me {a} made the difference.", "I spent the morning on {a}.",
    "Next time I would think about {a} earlier.", "Between {a} and {b} I lost track of time.", "Ask me about {a}.",
    "There is no shortcut around {a}.", "The best part was {a}, the hardest {b}.",
)  # fmt: skip
FILLERS = (
    "It took longer than planned, but I would do it again.", "Tell me in the comments what you think.",
    "The weather was kind to us.", "My sister laughed when she saw it.", "Save this for later if it helps.",
    "I am far from perfect at this.", "More next week, I promise.", "We started early and stayed until dark.",
    "It is not about being the best.", "Somebody asked for the details, so I wrote them down.",
    "I bought too much, as always.", "The first try went wrong, the second was better.", "Music on, phone away.",
    "Thank you for all the kind messages.", "I had saved this idea for months.", "A quiet afternoon was all I needed.",
    "Small steps count too.", "My neighbour gave me the idea.", "I keep a list of what went wrong.",
    "This is not an advert, I paid for everything myself.", "What would you have done?", "It cost almost nothing.",
    "I will keep you posted.", "Next month I want to try it with friends.", "Practice helps more than talent.",
    "My hands were tired, my head was clear.", "I wish I had begun years ago.", "Everything else can wait.",
)  # fmt: skip
TOPICS = (
    "daily life", "weekend", "tips", "my diary", "beginner", "inspiration", "hobby", "slow living", "good mood",
    "learning", "at home", "out and about", "self care", "favourites", "recommendation",
)  # fmt: skip

# The titles of text-poor notes: one entry from each column. They carry no signal.
POOR_TITLES: tuple[tuple[str, ...], ...] = (
    (
        "today", "look at this", "just this", "no words", "mine", "my favourite", "so pretty", "see for yourself",
        "new one", "what do you think", "love it", "this one", "guess what", "one more", "here it is", "hello",
        "and again", "best thing", "finally done", "wow", "as promised", "only a picture", "for you", "mood",
    ),
    (
        "", "again", "at last", "this morning", "tonight", "on monday", "on tuesday", "on wednesday", "on thursday",
        "on friday", "on saturday", "on sunday", "before work", "after lunch", "in between",
    ),
    ("", "or not", "maybe", "as ever", "really", "part one", "part two", "somehow", "haha", "see you"),
)  # fmt: skip

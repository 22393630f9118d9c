//! Words for keys and lists. None is part of another, so that each can be looked for in an output.

/// Adjectives, in the order of the alphabet.
pub const ADJECTIVES: &str = "ample ancient angry arctic awake azure basic bitter bold brave brief bright brisk broad calm careful cheap \
    chief civil clean clever cloudy common cosmic crisp cruel curly damp daring dark deep dense dim distant dizzy \
    dusty eager early easy elder empty equal exact faint fair famous fancy fast fierce final firm flat fluffy \
    foggy formal frank fresh frosty gentle giant gifted glad global golden grand grave happy harsh hasty heavy \
    hollow honest huge humble hungry icy ideal jolly junior keen kind large lazy level light little lively local \
    lonely lucky major mellow merry mighty mild modest muddy narrow neat nervous noble noisy odd ornate pale \
    patient plain polite proud pure quick quiet rapid rare ready remote rich rigid rough round royal rural rusty \
    sacred salty secret senior serious shallow sharp shiny short shy silent simple slim slow smart smooth soft \
    solid sour spare stable steady steep sticky strange strict strong subtle sudden sunny sweet swift tall tender \
    tense thick thin tidy tiny tired tough tranquil urban usual vague vast vivid warm weak weird wet wide wild \
    wise witty worthy young zesty";

/// Nouns, in the order of the alphabet.
pub const NOUNS: &str = "anchor apple autumn badge bakery balloon bamboo banana barrel basket battle beach beacon beetle bishop blanket \
    blossom bottle branch breeze brick bridge brother bucket butter button cabin cactus camera canal candle canyon \
    captain carpet castle cattle cavern cedar cellar chalk cheese cherry chimney circle circus clinic clock clover \
    coffee copper corner cotton cousin cradle crayon creek cricket crystal curtain cushion dagger daisy dancer \
    desert diamond dinner dolphin donkey dragon drawer driver eagle elbow emerald engine evening fabric falcon \
    farmer feather fiddle finger flute forest fossil fountain galaxy gallery garden garlic ginger glacier goblet \
    guitar hammer harbor harvest hazel helmet hermit honey horizon hunter insect island jacket jaguar journey \
    jungle kettle kitchen kitten ladder lagoon lantern lemon leopard letter library lizard lobster locket lumber \
    magnet mango maple marble market meadow melon mentor meteor mirror monkey morning mountain museum mustard \
    napkin needle nephew nickel notebook novel oasis ocean olive onion orange orchard otter oyster paddle palace \
    panther parrot pasture pebble pencil pepper pigeon pillow pirate planet pocket poet pony potato prairie puzzle \
    rabbit radish raven ribbon robin rocket saddle sailor salmon school scissors shadow shelter shepherd signal \
    silver sister socket soldier sparrow spider squirrel stadium statue summer sunset surgeon tailor teacher \
    temple thistle thunder ticket tiger timber toast tomato tower trumpet tulip tunnel turtle tutor uncle valley \
    velvet village violin voyage wagon walnut weasel whale wheat whistle willow window winter wizard wolf writer \
    yogurt zebra zipper";

/// Cities for the look-ups.
pub const CITIES: &str = "Paris London Rome Berlin Vienna Madrid Boston Chicago Dallas Denver Toronto Tokyo Delhi Sydney \
    Moscow Oxford Venice Florence Dublin Athens Houston Miami Seattle Austin Cairo Beijing";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_word_is_part_of_another() {
        let words: Vec<&str> = ADJECTIVES.split(' ').chain(NOUNS.split(' ')).collect();
        assert!(words.len() > 400);
        for (i, word) in words.iter().enumerate() {
            let holds = |(j, other): (usize, &&str)| j != i && other.contains(word);
            assert!(!words.iter().enumerate().any(holds), "{word}");
        }
    }
}

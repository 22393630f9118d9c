use std::path::Path;

use tokenizers::Tokenizer;
use xxhash_rust::xxh3::xxh3_64;

use super::*;

/// The tokenizer of the model `code`.
fn tokenizer() -> Tokenizer {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/code/tokenizer.json");
    Tokenizer::from_file(path).unwrap()
}

/// Real text: this program's own sources.
fn text() -> String {
    [
        include_str!("mod.rs"),
        include_str!("needles.rs"),
        include_str!("filler.rs"),
    ]
    .concat()
}

fn made(task: Task, lengths: &str, cases: usize, seed: u64, texts: &[String]) -> Result<Vec<Document>, TaskError> {
    let tokenizer = tokenizer();
    let options = TaskOptions {
        task,
        lengths: &lengths.parse().unwrap(),
        cases,
        seed,
        texts,
    };
    documents(&options, |text| Ok(tokenizer.encode(text, true).unwrap().len()))
}

const ALL: [Task; 6] = [
    Task::NiahSingle,
    Task::NiahMultiKey,
    Task::NiahMultiValue,
    Task::VariableTracking,
    Task::CommonWords,
    Task::LookUp,
];

#[test]
fn documents_are_as_long_as_asked_for_and_those_of_their_seed() {
    let tokenizer = tokenizer();
    for task in ALL {
        let texts = if task == Task::LookUp { vec![text()] } else { vec![] };
        let documents = made(task, "4k-6k", 5, 7, &texts).unwrap();
        for (i, d) in documents.iter().enumerate() {
            let (tokens, asked) = (tokenizer.encode(d.text(), true).unwrap().len(), 4096 + 512 * i);
            assert!(
                tokens <= asked && tokens * 100 >= asked * 98,
                "{task:?}: {tokens} of {asked}"
            );
            assert!(d.question.as_ref().is_some_and(|q| !q.is_empty()) && d.n_predict > Some(0));
        }
        let same = made(task, "4k-6k", 5, 7, &texts).unwrap();
        let other = made(task, "4k-6k", 5, 8, &texts).unwrap();
        for ((a, b), c) in documents.iter().zip(&same).zip(&other) {
            assert_eq!((a.text(), &a.answers), (b.text(), &b.answers));
            assert_ne!(a.answers, c.answers);
        }
        assert_ne!(documents[0].answers, documents[1].answers);
    }
}

/// What answers a question stands in the text as often as its task says, and not in the question.
#[test]
fn answers_stand_in_the_text_as_often_as_they_should() {
    let count = |text: &str, what: &str| text.matches(what).count();
    for (task, answers, needles) in [
        (Task::NiahSingle, 1, 1),
        (Task::NiahMultiKey, 1, 4),
        (Task::NiahMultiValue, 4, 4),
    ] {
        for texts in [vec![], vec![text()]] {
            for d in made(task, "2k", 6, 3, &texts).unwrap() {
                let question = d.question.as_deref().unwrap();
                assert_eq!(d.answers.len(), answers);
                assert_eq!(
                    count(&d.prompt, "\nOne of the special") + count(&d.prompt, " One of the special"),
                    needles
                );
                let key = question.split(" for ").nth(1).unwrap().split(' ').next().unwrap();
                for answer in &d.answers {
                    assert_eq!(count(&d.prompt, answer), 1, "{answer}");
                    assert_eq!(count(&d.prompt, &format!("numbers for {key} is: {answer}.")), 1);
                    assert_eq!(count(question, answer), 0);
                }
            }
        }
    }
    for d in made(Task::VariableTracking, "2k", 6, 3, &[]).unwrap() {
        // The chain, in its order: each variable but the last stands on both sides.
        let value = d
            .question
            .as_deref()
            .unwrap()
            .split("the value ")
            .nth(1)
            .unwrap()
            .split(' ')
            .next()
            .unwrap();
        assert_eq!((d.answers.len(), count(&d.prompt, value)), (5, 1));
        let mut from = value.to_owned();
        let mut rest = d.prompt.as_str();
        for (i, name) in d.answers.iter().enumerate() {
            let line = format!("VAR {name} = {from}");
            rest = rest.split_once(&line).unwrap_or_else(|| panic!("{line}")).1;
            assert_eq!(count(&d.prompt, name), if i < 4 { 2 } else { 1 });
            from = format!("VAR {name}");
        }
    }
    for lengths in ["3k", "16k"] {
        for d in made(Task::CommonWords, lengths, 2, 3, &[]).unwrap() {
            let list = d.prompt.rsplit_once("most often.\n").unwrap().1;
            let mut times = std::collections::HashMap::new();
            let mut words = list.split_whitespace();
            while let (Some(number), Some(word)) = (words.next(), words.next()) {
                assert!(number.ends_with('.'));
                *times.entry(word).or_insert(0) += 1;
            }
            let often: Vec<&&str> = times.iter().filter(|(_, n)| **n == 30).map(|(w, _)| w).collect();
            assert_eq!(often.len(), 10);
            assert!(d.answers.iter().all(|a| often.contains(&&a.as_str())));
            assert!(times.values().all(|&n| n == 30 || n == 3));
        }
    }
    for d in made(Task::LookUp, "2k-3k", 6, 3, &[text()]).unwrap() {
        assert_eq!(count(&d.prompt, &d.answers[0]), 1);
        assert_eq!(d.scorer, Some(Scorer::Prefix));
    }
}

/// Those that figures were measured with stay the same.
#[test]
fn documents_of_a_seed_never_change() {
    let hashes: Vec<String> = ALL
        .iter()
        .map(|&task| {
            let texts = if task == Task::LookUp {
                vec!["One line of words, again.\n".repeat(900)]
            } else {
                vec![]
            };
            let documents = made(task, "3k", 2, 1, &texts).unwrap();
            let all: Vec<String> = documents.iter().map(|d| serde_json::to_string(d).unwrap()).collect();
            format!("{:016x}", xxh3_64(all.join("\n").as_bytes()))
        })
        .collect();
    assert_eq!(hashes, GOLDEN);
}

const GOLDEN: [&str; 6] = [
    "d60c0ec08c4aea13",
    "80a23411e6c00bf1",
    "18999896060083d8",
    "99fcf716e69a4f3e",
    "303d699f08888bbc",
    "7f94e51f2ceb279a",
];

#[test]
fn what_cannot_be_made_says_why() {
    let error = |task, lengths: &str, texts: &[String]| made(task, lengths, 1, 1, texts).unwrap_err().to_string();
    assert!(error(Task::LookUp, "1k", &[]).contains("--text"));
    assert!(error(Task::CommonWords, "4k", &[text()]).contains("leave out --text"));
    assert!(error(Task::CommonWords, "1k", &[]).contains("larger --length"));
    assert!(error(Task::NiahSingle, "20", &[]).contains("larger --length"));
    let short = ["A short text.".to_owned()];
    assert!(error(Task::LookUp, "1k", &short).contains("longer ones with --text"));
    assert!(error(Task::LookUp, "1k", &[String::new()]).contains("longer ones with --text"));
    for wrong in ["", "0", "4x", "7k-4k", "k", "9999999k", "-", "99999999999999999999"] {
        assert!(wrong.parse::<Lengths>().is_err(), "{wrong}");
    }
    let lengths: Lengths = "4k-7k".parse().unwrap();
    assert_eq!(
        (lengths.of(0, 4), lengths.of(3, 4), lengths.of(0, 1)),
        (4096, 7168, 4096)
    );
}

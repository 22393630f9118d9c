//! A conversation on one cache is the same as one that reads everything anew, at temperature 0.

mod ledger;

use std::{fs, sync::OnceLock};

use ledger::Ledger;
use retro_run::{
    Model, ModelFolder, ModelTokenizer, OpenOptions, Runtime,
    chat::{Chat, ChatOptions, Error, Message, Role},
    decoder::{
        self,
        decode_loop::{CHUNK, Policy},
        generate::{ContextPlan, Event, Finish, Generation, generate},
        sampling::Sampling,
    },
    interrupt::Interrupt,
    text::chat_template::{ChatTemplate, RenderOptions},
};

/// Messages one after another, as `ledger` knows its documents: the answer ends with `<eos>`.
const PLAIN: &str =
    "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %} <eos>{% endif %} {% endfor %}";

/// Of all answers but the newest only the first word stays, as models that think drop their earlier thinking.
const FORGETFUL: &str = "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content.split(' ')[0] }} <eos>\
                         {% else %}{{ m.content }}{% endif %} {% endfor %}";

/// `ledger` as it is, with caches that grow, and converted.
struct Models {
    models: Ledger,
    runtime: Runtime,
}

impl Models {
    /// One for all tests: ONNX Runtime is loaded once a process.
    fn get() -> &'static Self {
        static MADE: OnceLock<Models> = OnceLock::new();
        MADE.get_or_init(Self::make)
    }

    fn make() -> Self {
        let models = Ledger::new();
        let (dense, growing) = (models.path(Ledger::DENSE), models.path("growing"));
        fs::create_dir(&growing).unwrap();
        for file in ["model.onnx", "model.onnx.data", "config.json", "tokenizer.json"] {
            fs::copy(dense.join(file), growing.join(file)).unwrap();
        }
        let settings = retro_export::Settings {
            window: 4,
            ..Default::default()
        };
        models.convert("retro", settings);
        let runtime = Runtime::load(None).unwrap();
        Self { models, runtime }
    }

    fn open(&self, name: &str) -> (Model, ModelTokenizer) {
        let options = OpenOptions {
            threads: Some(2),
            ..OpenOptions::default()
        };
        let model = self.models.open(&self.runtime, name, options);
        let tokenizer = ModelTokenizer::open(&model.folder).unwrap();
        (model, tokenizer)
    }

    fn template(&self, text: &str) -> ChatTemplate {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(&file, text).unwrap();
        let model = ModelFolder::open(&self.models.path(Ledger::DENSE), None).unwrap();
        ChatTemplate::from_file(file.path(), &model).unwrap()
    }

    fn chat(&self, name: &str, template: &str, window: usize, options: &dyn Fn(&mut ChatOptions)) -> Chat {
        let (model, tokenizer) = self.open(name);
        let mut chosen = ChatOptions::new(policy(&model, window));
        chosen.max_answer = Some(24);
        options(&mut chosen);
        Chat::new(model, tokenizer, self.template(template), chosen).unwrap()
    }

    /// What is generated of the whole conversation by a run that knows nothing of it; and the conversation's tokens.
    fn anew(&self, name: &str, template: &str, window: usize, conversation: &[Message]) -> (String, Vec<u32>) {
        self.anew_with(name, template, conversation, &|model| policy(model, window))
    }

    fn anew_with(
        &self,
        name: &str,
        template: &str,
        conversation: &[Message],
        policy: &dyn Fn(&Model) -> Policy,
    ) -> (String, Vec<u32>) {
        let (mut model, tokenizer) = self.open(name);
        let messages: Vec<_> = conversation.iter().map(|m| serde_json::to_value(m).unwrap()).collect();
        let options = RenderOptions {
            add_generation_prompt: true,
            ..RenderOptions::default()
        };
        let text = self.template(template).render(&messages, &options).unwrap();
        let prompt = tokenizer.encode_as_is(&text).unwrap();
        let options = Generation {
            plan: ContextPlan {
                capacity: 2048,
                max_new: 24,
            },
            policy: policy(&model),
            chunk: CHUNK,
            sampling: Sampling::default(),
            stops: Vec::new(),
            more_ends: Vec::new(),
            ignore_eos: false,
            interrupt: Interrupt::default(),
        };
        let output = generate::<decoder::Error>(&mut model, &tokenizer, &prompt, &options, &mut |_| Ok(())).unwrap();
        (output.text, prompt)
    }
}

/// Everything is read: what a smaller budget makes of an answer stays in the cache, and a prompt is read densely.
fn policy(model: &Model, window: usize) -> Policy {
    let budget = model.retro.is_some().then(|| "1.0".parse().unwrap());
    Policy::new(model, Some(window), budget).unwrap()
}

fn say(chat: &mut Chat, text: &str) -> Result<(String, usize, Finish), Error> {
    let mut streamed = String::new();
    let answer = chat.say::<Error>(text, &mut |event| {
        if let Event::Text(piece) = event {
            streamed += piece;
        }
        Ok(())
    })?;
    assert_eq!(answer.text, streamed);
    Ok((streamed, answer.stats.prompt_tokens, answer.finish))
}

const LINES: [&str; 3] = [
    "<bos> facts : problem #1 : coins of Ben ? coins of Ben 3 . coins of Jane 4 . friend of Ben Jane .",
    "problem #2 : coins of friend of Ben ?",
    "problem #3 : coins of Jane minus coins of Ben ?",
];

#[test]
fn turns_on_one_cache_are_as_one_prompt_of_all() {
    let models = Models::get();
    let anew_after_going_back = ["growing"];
    for (name, window) in [("dense", 1), ("growing", 1), ("retro", 1), ("retro", 4)] {
        for template in [PLAIN, FORGETFUL] {
            let mut chat = models.chat(name, template, window, &|_| ());
            for (turn, line) in LINES.into_iter().enumerate() {
                let held = chat.held().to_vec();
                let (text, read, _) = say(&mut chat, line).unwrap();
                let (last, before) = chat.messages().split_last().unwrap();
                assert_eq!(*last, Message::new(Role::Assistant, &text));
                let (expected, prompt) = models.anew(name, template, window, before);
                let what = format!("{name}, window {window}, turn {turn}");
                assert_eq!(text, expected, "{what}");
                // Nothing that the cache holds is read again.
                let common = held.iter().zip(&prompt).take_while(|(a, b)| a == b).count();
                let goes_back = common < held.len();
                assert_eq!(goes_back, template == FORGETFUL && turn > 0, "{what}");
                if goes_back && anew_after_going_back.contains(&name) {
                    assert_eq!(read, prompt.len(), "{what}");
                } else {
                    assert_eq!(read, prompt.len() - common, "{what}");
                    assert!(
                        turn == 0 || read < prompt.len() / 2,
                        "{what}: {read} of {}",
                        prompt.len()
                    );
                }
                assert!(chat.held().starts_with(&prompt), "{what}");
            }
        }
    }
}

/// With rectifying passes the cache that a turn begins with is that of a prompt, however little steps read: what no pass
/// has reached is read again.
#[test]
fn with_passes_a_turn_begins_as_a_prompt_of_all() {
    let models = Models::get();
    let sparse = |model: &Model, rectify| {
        let policy = Policy::new(model, Some(2), Some("16".parse().unwrap())).unwrap();
        policy.rectified(model, rectify).unwrap()
    };
    for rectify in [1, 7, 100] {
        let rectified = |chat: &mut ChatOptions, model: &Model| chat.policy = sparse(model, Some(rectify));
        let (model, _) = models.open("retro");
        let mut chat = models.chat("retro", PLAIN, 2, &|chat| rectified(chat, &model));
        for (turn, line) in LINES.into_iter().enumerate() {
            let held = chat.held().len();
            let (text, read, _) = say(&mut chat, line).unwrap();
            let stats = &chat.last().unwrap().stats;
            let passes = stats.passes.unwrap().count;
            // A pass comes with the step after N others.
            assert_eq!(
                passes,
                stats.decoded_tokens.saturating_sub(1) / rectify,
                "every {rectify}, turn {turn}"
            );
            let before = &chat.messages()[..2 * turn + 1];
            let (expected, prompt) = models.anew_with("retro", PLAIN, before, &|model| sparse(model, Some(rectify)));
            assert_eq!(text, expected, "every {rectify}, turn {turn}");
            assert_eq!(
                (read, chat.held().len()),
                (prompt.len() - held, prompt.len() + passes * rectify)
            );
        }
    }
    let (model, _) = models.open("retro");
    let error = policy(&model, 1).rectified(&model, Some(4096)).unwrap_err().to_string();
    assert!(error.contains("--rectify 4096"), "{error}");
    let tokenizer = ModelTokenizer::open(&model.folder).unwrap();
    let options = ChatOptions {
        context: Some(60),
        ..ChatOptions::new(sparse(&model, Some(61)))
    };
    let error = Chat::new(model, tokenizer, models.template(PLAIN), options)
        .err()
        .unwrap();
    assert!(error.to_string().contains("context of 60"), "{error}");
}

#[test]
fn an_interrupted_answer_stays_as_far_as_it_came() {
    let models = Models::get();
    let interrupt = Interrupt::default();
    let mut chat = models.chat("retro", PLAIN, 4, &|o| o.interrupt = interrupt.clone());
    let mut pieces = 0;
    let answer = chat.say::<Error>(LINES[0], &mut |event| {
        pieces += usize::from(matches!(event, Event::Text(_)));
        if pieces == 5 {
            interrupt.raise(2);
        }
        Ok(())
    });
    let answer = answer.unwrap().clone();
    assert_eq!((answer.finish, answer.stats.generated_tokens), (Finish::Interrupted, 5));
    assert_eq!(chat.messages()[1].content, answer.text);

    // Interrupted before anything came of it: the message is not part of the conversation.
    let before = chat.messages().to_vec();
    let (text, _, finish) = say(&mut chat, LINES[1]).unwrap();
    assert_eq!((text.as_str(), finish), ("", Finish::Interrupted));
    assert_eq!(chat.messages(), before);

    interrupt.raise(0);
    let (text, _, _) = say(&mut chat, LINES[1]).unwrap();
    let conversation = &chat.messages()[..3];
    assert_eq!(text, models.anew("retro", PLAIN, 4, conversation).0);
}

#[test]
fn a_full_context_is_told_and_the_talk_stays() {
    let models = Models::get();
    let mut chat = models.chat("dense", PLAIN, 1, &|o| o.context = Some(60));
    let (first, _, _) = say(&mut chat, LINES[0]).unwrap();
    let before = chat.messages().to_vec();
    let error = say(&mut chat, &"coins ".repeat(50)).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Full {
                capacity: 60,
                larger: true,
                ..
            }
        ),
        "{error}"
    );
    assert!(
        error.to_string().contains("/clear") && error.to_string().contains("-c"),
        "{error}"
    );
    assert_eq!(chat.messages(), before);
    // An answer is cut where the context ends.
    let (_, _, finish) = say(&mut chat, "problem #2 :").unwrap();
    assert_eq!(finish, Finish::Length);
    assert_eq!(chat.last().unwrap().used, 60);
    chat.clear();
    let (again, read, _) = say(&mut chat, LINES[0]).unwrap();
    assert_eq!((again, read), (first, 1), "the cache holds the first message still");
}

#[test]
fn an_error_of_who_listens_keeps_the_talk() {
    let models = Models::get();
    let mut chat = models.chat("retro", PLAIN, 4, &|_| ());
    let (first, _, _) = say(&mut chat, LINES[0]).unwrap();
    let before = chat.messages().to_vec();
    let error = chat.say::<Error>(LINES[1], &mut |_| Err(Error::UnknownContext));
    assert!(matches!(error, Err(Error::UnknownContext)));
    assert_eq!(chat.messages(), before);
    chat.clear();
    assert_eq!(say(&mut chat, LINES[0]).unwrap().0, first);
}

#[test]
fn the_templates_end_of_a_turn_ends_an_answer() {
    let models = Models::get();
    let root = ledger::root();
    let documents = fs::read_to_string(root.join("models/ledger/documents.jsonl")).unwrap();
    let document: serde_json::Value = serde_json::from_str(documents.lines().next().unwrap()).unwrap();
    for (template, finish) in [(PLAIN, Finish::Eos), ("{{ messages[0].content }}", Finish::Length)] {
        // The model's configuration names no end.
        let (mut model, tokenizer) = models.open("dense");
        model.folder.eos.clear();
        model.folder.eos_token = None;
        let options = ChatOptions::new(policy(&model, 1));
        let mut chat = Chat::new(model, tokenizer, models.template(template), options).unwrap();
        assert_eq!(say(&mut chat, document["prompt"].as_str().unwrap()).unwrap().2, finish);
    }
}

#[test]
fn a_system_prompt_is_set_and_the_talk_is_read_again() {
    let models = Models::get();
    let mut chat = models.chat("retro", PLAIN, 4, &|_| ());
    say(&mut chat, LINES[0]).unwrap();
    chat.set_system(Some("so"));
    chat.set_system(Some("problem"));
    assert_eq!((chat.system(), chat.messages().len()), (Some("problem"), 3));
    let (text, read, _) = say(&mut chat, LINES[1]).unwrap();
    let (expected, prompt) = models.anew("retro", PLAIN, 4, &chat.messages()[..4]);
    assert_eq!((text, read), (expected, prompt.len()));
    chat.clear();
    assert_eq!(chat.messages(), [Message::new(Role::System, "problem")]);
    chat.set_system(None);
    assert!(chat.messages().is_empty());
}

//! What chats and completions ask for alike: how tokens are chosen, how many, and what a step reads.

use std::time::Instant;

use retro_contract::Budget;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{
    app::Loaded,
    error::{ApiError, Result},
    fields::Fields,
};
use crate::{
    decoder::{decode_loop::Policy, sampling::Sampling},
    serve::{choose::Choosing, constraint::Constraint, request::Request},
};

/// The most answers to one prompt.
const MOST_ANSWERS: usize = 16;
/// The most stop strings, and the most bytes of one.
const MOST_STOPS: (usize, usize) = (16, 256);
/// The most tokens with a bias.
const MOST_BIASES: usize = 1024;

/// Fields that say nothing about the answer.
const SET_ASIDE: [&str; 6] = [
    "model",
    "user",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
];

/// Fields of llama-server and vLLM with the value that asks for what the server does anyway, as their clients send them.
const DONE_ANYWAY: [(&str, f64); 13] = [
    ("cache_prompt", 1.0),
    ("id_slot", -1.0),
    ("timings_per_token", 0.0),
    ("typical_p", 1.0),
    ("mirostat", 0.0),
    ("dry_multiplier", 0.0),
    ("xtc_probability", 0.0),
    ("dynatemp_range", 0.0),
    ("min_tokens", 0.0),
    ("length_penalty", 1.0),
    ("use_beam_search", 0.0),
    ("skip_special_tokens", 1.0),
    ("include_stop_str_in_output", 0.0),
];

/// What a request asks for, beside its prompt.
#[derive(Clone, Debug)]
pub struct Generation {
    pub max_new: Option<usize>,
    pub n: usize,
    pub stream: bool,
    pub include_usage: bool,
    /// Every event of a stream says what the answer took so far.
    pub live: bool,
    pub policy: Policy,
    pub choosing: Choosing,
    pub stops: Vec<String>,
    pub ignore_eos: bool,
    pub logprobs: Option<usize>,
    pub constraint: Option<Constraint>,
}

/// One string or several.
#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a string or a list of strings")]
enum Strings {
    One(String),
    Many(Vec<String>),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
    /// As vLLM has it: usage in every event.
    #[serde(default)]
    continuous_usage_stats: bool,
    /// Padding against listeners who count bytes: there is none.
    #[serde(default, rename = "include_obfuscation")]
    _include_obfuscation: bool,
}

impl Generation {
    /// Takes the fields. Log-probabilities differ between endpoints, and are left to them.
    pub fn take(fields: &mut Fields, loaded: &Loaded) -> Result<Self> {
        fields.set_aside(&SET_ASIDE);
        for (name, value) in DONE_ANYWAY {
            let word = (value == 0.0 || value == 1.0).then(|| json!(value == 1.0));
            let values = [json!(value), json!(value as i64)];
            fields.only(name, &[&values[..], word.as_slice()].concat())?;
        }
        fields.only("store", &[json!(false)])?;
        fields.only("service_tier", &[json!("auto"), json!("default")])?;
        let stream = fields.take("stream")?.unwrap_or(false);
        let options: Option<StreamOptions> = fields.take("stream_options")?;
        if options.is_some() && !stream {
            return Err(ApiError::field("stream_options", "only with \"stream\": true"));
        }
        let include_usage = options.as_ref().is_some_and(|o| o.include_usage);
        let live = options.as_ref().is_some_and(|o| o.continuous_usage_stats);
        if live && !include_usage {
            let message = "continuous_usage_stats only with \"include_usage\": true";
            return Err(ApiError::field("stream_options", message));
        }
        let max_tokens = fields.count("max_tokens", 1..=usize::MAX)?;
        let max_completion_tokens = fields.count("max_completion_tokens", 1..=usize::MAX)?;
        let n_predict = n_predict(fields)?;
        Ok(Self {
            max_new: max_completion_tokens.or(max_tokens).or(n_predict),
            n: fields.count("n", 1..=MOST_ANSWERS)?.unwrap_or(1),
            stream,
            include_usage,
            live,
            policy: policy(fields, loaded)?,
            choosing: choosing(fields, loaded)?,
            stops: stops(fields)?,
            ignore_eos: fields.take("ignore_eos")?.unwrap_or(false),
            logprobs: None,
            constraint: None,
        })
    }

    /// The requests for a prompt: one for each answer. `param` is the field that the prompt came from.
    pub fn requests(&self, loaded: &Loaded, prompt: &[u32], param: &str) -> Result<Vec<Request>> {
        let engine = &loaded.engine;
        let context = engine.context();
        let room = context.checked_sub(prompt.len()).filter(|&room| room > 0);
        let room = room.ok_or_else(|| ApiError::too_long(param, prompt.len(), context))?;
        if self.ignore_eos && self.constraint.is_some() {
            return Err(ApiError::field(
                "ignore_eos",
                "an answer of a given form has its own end",
            ));
        }
        let request = |i: usize| {
            let mut choosing = self.choosing.clone();
            choosing.sampling.seed = choosing.sampling.seed.wrapping_add(i as u64);
            Request {
                prompt: prompt.to_vec(),
                max_new: self.max_new.map_or(room, |most| most.min(room)),
                policy: self.policy,
                choosing,
                constraint: self.constraint.clone(),
                stops: self.stops.clone(),
                ends: std::sync::Arc::clone(engine.ends()),
                ignore_eos: self.ignore_eos,
                logprobs: self.logprobs,
                live: self.live,
                deadline: loaded.timeout.and_then(|time| Instant::now().checked_add(time)),
            }
        };
        Ok((0..self.n).map(request).collect())
    }
}

/// llama-server's own name for the most tokens of an answer; -1 is as many as fit.
fn n_predict(fields: &mut Fields) -> Result<Option<usize>> {
    let name = "n_predict";
    let most: Option<i64> = fields.take(name)?;
    let most = most.filter(|&most| most != -1).map(|most| {
        let most = usize::try_from(most).ok().filter(|&most| most > 0);
        most.ok_or_else(|| ApiError::field(name, "expected 1 or more, or -1 for as many as fit"))
    });
    most.transpose()
}

fn policy(fields: &mut Fields, loaded: &Loaded) -> Result<Policy> {
    let engine = &loaded.engine;
    let default = engine.options().policy;
    let window = fields.count("window", 1..=engine.most_window())?;
    let budget = match fields.take::<Value>("budget")? {
        None => default.budget,
        Some(_) if !engine.takes_budget() => {
            let message = "this model was not converted for budgets: convert it with retro-export";
            return Err(ApiError::field("budget", message));
        }
        // 0.1 is a share of the context, 2048 so many tokens; as text too, as the command line has it.
        Some(value) => {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let budget: Result<Budget, _> = text.parse();
            Some(budget.map_err(|e| ApiError::field("budget", e))?)
        }
    };
    let rectify = fields.count("rectify", 1..=engine.context())?;
    if rectify.is_some() && !engine.is_converted() {
        let message = "this model reads everything, so there is nothing to rectify: convert it with retro-export";
        return Err(ApiError::field("rectify", message));
    }
    let window = window.unwrap_or(default.window);
    let policy = Policy {
        budget,
        // Whoever names a budget means it.
        dense_below: if budget == default.budget {
            default.dense_below
        } else {
            0
        },
        rectify: rectify.or(default.rectify),
        ..default
    };
    Ok(policy.with_window(window))
}

fn choosing(fields: &mut Fields, loaded: &Loaded) -> Result<Choosing> {
    let default = loaded.sampling;
    let top_k: Option<i64> = fields.take("top_k")?;
    // -1 is vLLM's way to say all.
    let top_k = match top_k {
        None => default.top_k,
        Some(-1) => 0,
        Some(k) => usize::try_from(k).map_err(|_| ApiError::field("top_k", format!("{k} is less than -1")))?,
    };
    let top_p = fields.number("top_p", 0.0..=1.0)?;
    if top_p == Some(0.0) {
        return Err(ApiError::field("top_p", "0 leaves no token: it is more than 0"));
    }
    let repeat = fields.number("repeat_penalty", 0.01..=10.0)?;
    let repeat = fields.number("repetition_penalty", 0.01..=10.0)?.or(repeat);
    let seed: Option<i64> = fields.take("seed")?;
    let sampling = Sampling {
        temperature: fields.number("temperature", 0.0..=2.0)?.unwrap_or(default.temperature),
        top_k,
        top_p: top_p.unwrap_or(default.top_p),
        min_p: fields.number("min_p", 0.0..=1.0)?.unwrap_or(default.min_p),
        repeat_penalty: repeat.unwrap_or(default.repeat_penalty),
        seed: seed.map_or_else(rand::random, i64::cast_unsigned),
    };
    sampling.check().map_err(|e| ApiError::request(e.to_string()))?;
    Ok(Choosing {
        sampling,
        presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        bias: biases(fields, loaded.engine.tokenizer().size())?,
    })
}

fn biases(fields: &mut Fields, vocabulary: usize) -> Result<Vec<(u32, f32)>> {
    let name = "logit_bias";
    let biases: Option<Map<String, Value>> = fields.take(name)?;
    let biases = biases.unwrap_or_default();
    if biases.len() > MOST_BIASES {
        return Err(ApiError::field(name, format!("more than {MOST_BIASES} tokens")));
    }
    let bias = |(token, value): (String, Value)| {
        let token = token.parse().ok().filter(|&id: &u32| (id as usize) < vocabulary);
        let message = || format!("its keys are the numbers of tokens, below {vocabulary}");
        let token = token.ok_or_else(|| ApiError::field(name, message()))?;
        let bias = value.as_f64().filter(|x| (-100.0..=100.0).contains(x));
        let bias = bias.ok_or_else(|| ApiError::field(name, format!("{value} is not in -100 to 100")))?;
        Ok((token, bias as f32))
    };
    biases.into_iter().map(bias).collect()
}

fn stops(fields: &mut Fields) -> Result<Vec<String>> {
    let stops = match fields.take("stop")? {
        None => Vec::new(),
        Some(Strings::One(stop)) => vec![stop],
        Some(Strings::Many(stops)) => stops,
    };
    let (most, longest) = MOST_STOPS;
    if stops.len() > most || stops.iter().any(|s| s.len() > longest) {
        let message = format!("at most {most} strings of at most {longest} bytes");
        return Err(ApiError::field("stop", message));
    }
    if stops.iter().any(String::is_empty) {
        return Err(ApiError::field("stop", "an empty string"));
    }
    Ok(stops)
}

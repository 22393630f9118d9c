//! `retro-run serve`: a server that speaks OpenAI's API.

use std::{
    path::PathBuf,
    sync::{Arc, OnceLock},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use retro_contract::limits;

use super::{
    args::{ModelArgs, ReadingArgs, SessionArgs},
    template::TemplateArgs,
};
use crate::{
    Model, ModelTokenizer, OpenOptions, Runtime,
    built_model_cache::prepare,
    chat::turn_end,
    decoder::sampling::Sampling,
    interrupt::Signals,
    progress::note,
    serve::{
        Engine, EngineOptions, Metrics,
        http::{Loaded, Server, Settings, now},
    },
    text::token_bytes,
};

/// Where the sampling of requests comes from that do not say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum GenerationConfig {
    /// The model's generation_config.json.
    Auto,
    /// OpenAI's API: temperature 1, all tokens.
    None,
}

#[derive(Args)]
pub struct ServeArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Address to listen on. Others than loopback addresses are reached from outside: give --api-key then.
    #[arg(long, default_value = "127.0.0.1", value_name = "HOST")]
    host: String,
    /// Port to listen on; 0 takes a free one.
    #[arg(long, default_value_t = 8080, value_name = "PORT")]
    port: u16,
    /// Requests that run at a time, each in a slot of its own.
    #[arg(long, default_value_t = 8, value_name = "N")]
    parallel: usize,
    /// Requests that wait for a slot at a time; more are refused with 429.
    #[arg(long, default_value_t = 64, value_name = "N")]
    queue: usize,
    /// Context size: maximum tokens of prompt and output of a request [default: the model's context, 8192 at most].
    #[arg(short, long, value_name = "N")]
    ctx_size: Option<usize>,
    /// Seconds that a request may take, waiting included; 0 is no limit.
    #[arg(long, default_value_t = 600, value_name = "SECONDS")]
    timeout: u64,
    /// Seconds that running requests get when the server is asked to stop (SIGINT, SIGTERM).
    #[arg(long, default_value_t = 30, value_name = "SECONDS")]
    grace: u64,
    /// Name of the model for clients [default: its folder's].
    #[arg(long, value_name = "NAME")]
    alias: Option<String>,
    /// Key that clients must send; may be given several times.
    #[arg(
        long,
        env = "RETRO_API_KEY",
        hide_env_values = true,
        value_delimiter = ',',
        value_name = "KEY"
    )]
    api_key: Vec<String>,
    /// Origin whose pages may read answers in a browser, or * for all; may be given several times.
    #[arg(long, value_name = "ORIGIN")]
    cors: Vec<String>,
    /// The most bytes of a request's body.
    #[arg(long, default_value_t = 4 << 20, value_name = "BYTES")]
    max_body: usize,
    /// Print a line a request: its path, status and time.
    #[arg(long)]
    log: bool,
    /// Print prompts.
    #[arg(long)]
    log_prompts: bool,
    #[command(flatten)]
    reading: ReadingArgs,
    /// How tokens are chosen where a request does not say: auto takes what the model's generation_config.json names, none
    /// OpenAI's defaults alone.
    #[arg(long, value_enum, default_value_t = GenerationConfig::Auto, value_name = "auto|none", hide_possible_values = true)]
    generation_config: GenerationConfig,
    /// Chat template to use in place of the model's: a Jinja file.
    #[arg(long, value_name = "FILE")]
    template: Option<PathBuf>,
    #[command(flatten)]
    session: SessionArgs,
}

/// Runs the command.
///
/// # Errors
/// When an option or the model cannot be used, or the address cannot be had.
pub fn serve(args: ServeArgs, signals: &Signals) -> Result<()> {
    args.reading.check()?;
    ensure!(args.parallel >= 1, "--parallel 0: at least one request runs at a time");
    ensure!(args.queue >= 1, "--queue 0: at least one request waits at a time");
    ensure!(
        args.api_key.iter().all(|key| !key.trim().is_empty()),
        "--api-key: an empty key"
    );
    let keys: Vec<String> = args.api_key.iter().map(|key| key.trim().to_owned()).collect();
    ensure!(
        keys.iter().all(|key| key.bytes().all(|b| b.is_ascii_graphic())),
        "--api-key: a key has letters, digits and signs of ASCII alone, no spaces, as clients send it in a header"
    );
    let named = args.model.path()?;
    let (runtime, open) = args.session.load()?;
    let settings = Settings {
        max_body: args.max_body,
        api_keys: keys,
        cors: args.cors.clone(),
        loopback_only: false,
        log: args.log,
        log_prompts: args.log_prompts,
    };
    let metrics = Arc::new(Metrics::default());
    let grace = Duration::from_secs(args.grace);
    let interrupt = signals.listen();
    let network = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the server's threads")?;
    network.block_on(async {
        let server = Server::bind(&args.host, args.port, settings, Arc::clone(&metrics)).await?;
        let address = server.address()?;
        note(&format!("listening on http://{address}; the model is being loaded"));
        if !address.ip().is_loopback() && args.api_key.is_empty() {
            note("anyone who reaches this address may use the server: --api-key KEY asks for a key");
        }
        let load = move || load(&args, &named, &runtime, &open, metrics);
        server.serve(load, interrupt, grace).await
    })?;
    note("stopped");
    Ok(())
}

impl ServeArgs {
    /// How tokens are chosen where a request does not say; a line tells if that is not as in OpenAI's API.
    fn sampling(&self, model: &Model) -> Result<Sampling> {
        let plain = Sampling::of_server(&Default::default())?;
        if self.generation_config == GenerationConfig::None {
            return Ok(plain);
        }
        let wrong = "generation_config.json has a value that cannot be used; --generation-config none leaves it out";
        let sampling = Sampling::of_server(&model.folder.sampling).context(wrong)?;
        sampling.check().context(wrong)?;
        if sampling != plain {
            let how = sampling.describe();
            note(&format!(
                "requests that do not say are sampled by generation_config.json: {how}"
            ));
        }
        Ok(sampling)
    }
}

fn load(
    args: &ServeArgs,
    named: &std::path::Path,
    runtime: &Runtime,
    open: &OpenOptions,
    metrics: Arc<Metrics>,
) -> Result<Loaded> {
    let window = args.reading.window.unwrap_or(limits::WINDOW);
    let folder = prepare(named, window, open.device, open.plugin.is_some(), &mut note)?;
    let model = Model::open(runtime, &folder, open)?;
    let tokenizer = ModelTokenizer::open(&model.folder)?;
    let template = TemplateArgs::named(args.template.clone()).find(&model.folder)?;
    let ends = template
        .as_ref()
        .and_then(|t| turn_end::written(t, &tokenizer, &Default::default()));
    let sampling = args.sampling(&model)?;
    let options = EngineOptions {
        parallel: args.parallel,
        context: args.ctx_size,
        chunk: args.reading.chunk,
        queue: args.queue,
        policy: args.reading.policy(&model)?,
    };
    for line in [Some(model.plugin_line()), model.device_line()].into_iter().flatten() {
        note(&line);
    }
    let folder_name = named.file_name().map(|n| n.to_string_lossy().into_owned());
    let token_bytes = token_bytes(&tokenizer);
    let ends: Vec<u32> = ends.into_iter().collect();
    let engine = Engine::start(model, Arc::new(tokenizer), &ends, options, metrics)?;
    Ok(Loaded {
        engine,
        template,
        token_bytes,
        grammars: OnceLock::new(),
        name: args.alias.clone().or(folder_name).unwrap_or_else(|| "model".to_owned()),
        path: named.display().to_string(),
        sampling,
        created: now(),
        timeout: (args.timeout > 0).then(|| Duration::from_secs(args.timeout)),
    })
}

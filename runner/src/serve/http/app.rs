//! What the endpoints share.

use std::{
    sync::{Arc, OnceLock, RwLock},
    thread::available_parallelism,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use axum::{
    body::Body,
    http::{Request, header},
};
use tokio::sync::Semaphore;

use super::{
    bodies::Bodies,
    error::{ApiError, Result},
    fields::Fields,
};
use crate::{
    decoder::sampling::Sampling,
    serve::{constraint::Grammars, engine::Engine, metrics::Metrics},
    text::{TokenBytes, chat_template::ChatTemplate},
};

/// Time that a body may take to arrive.
const BODY_TIME: Duration = Duration::from_secs(30);

/// How the server answers.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The most bytes of a body.
    pub max_body: usize,
    /// Keys, one of which a client must send; none: no key is asked for.
    pub api_keys: Vec<String>,
    /// Origins whose pages may read answers; `*` for all.
    pub cors: Vec<String>,
    /// Requests must name this machine by a loopback name, so that no page in a browser can reach the server under a
    /// name of its own.
    pub loopback_only: bool,
    /// Print a line a request.
    pub log: bool,
    /// Print prompts too.
    pub log_prompts: bool,
}

/// The state of the server.
pub struct App {
    pub settings: Settings,
    pub metrics: Arc<Metrics>,
    bodies: Bodies,
    /// Requests that are taken apart at a time: a text takes many times its size while it is made tokens.
    takers: Arc<Semaphore>,
    /// The model, once it is loaded.
    loaded: RwLock<Option<Arc<Loaded>>>,
}

/// A model that is loaded.
pub struct Loaded {
    /// Serves requests.
    pub engine: Engine,
    /// The chat template, if the model has one.
    pub template: Option<ChatTemplate>,
    /// The bytes of each token; `None` where tokens are words.
    pub token_bytes: Option<Vec<TokenBytes>>,
    /// Made when they are first asked for.
    pub grammars: OnceLock<std::result::Result<Grammars, String>>,
    /// What clients call the model.
    pub name: String,
    /// The model's folder.
    pub path: String,
    /// How tokens are chosen where a request does not say.
    pub sampling: Sampling,
    /// When it was loaded, in seconds since 1970.
    pub created: u64,
    /// Time that a request may take.
    pub timeout: Option<Duration>,
}

impl Loaded {
    /// Refuses a text that has more bytes than the context's tokens can have. Making tokens of it would take long.
    pub fn fits(&self, param: &str, text: &str) -> Result<()> {
        let context = self.engine.context();
        let bytes = self.token_bytes.iter().flatten().map(|token| token.bytes.len());
        let most = bytes
            .max()
            .map_or(usize::MAX, |longest| longest.saturating_mul(context));
        if text.len() > most {
            return Err(ApiError::too_many_bytes(param, text.len(), context));
        }
        Ok(())
    }

    /// What makes constraints for the model's vocabulary; the reason where nothing can.
    pub fn grammars(&self) -> std::result::Result<&Grammars, &str> {
        let make = || {
            let tokens = self.token_bytes.as_ref();
            let tokens = tokens.ok_or("its tokens are words, not bytes")?;
            Grammars::new(tokens, self.engine.ends()).map_err(|e| e.to_string())
        };
        self.grammars.get_or_init(make).as_ref().map_err(String::as_str)
    }
}

impl App {
    pub fn new(settings: Settings, metrics: Arc<Metrics>) -> Self {
        Self {
            bodies: Bodies::new(settings.max_body),
            takers: Arc::new(Semaphore::new(available_parallelism().map_or(1, usize::from))),
            settings,
            metrics,
            loaded: RwLock::new(None),
        }
    }

    /// The model is loaded.
    pub fn load(&self, loaded: Loaded) {
        if let Ok(mut place) = self.loaded.write() {
            *place = Some(Arc::new(loaded));
        }
    }

    /// Takes the model out: nothing is served any more.
    pub fn unload(&self) -> Option<Arc<Loaded>> {
        self.loaded.write().ok().and_then(|mut place| place.take())
    }

    /// # Errors
    /// While the model is being loaded, and once it is not served any more.
    pub fn loaded(&self) -> Result<Arc<Loaded>> {
        let loaded = self.loaded.read().ok().and_then(|place| place.clone());
        loaded.ok_or_else(ApiError::loading)
    }

    /// What a request asks for: `take` makes it of the fields of its body, beside those who wait for the network.
    ///
    /// # Errors
    /// When the body is no JSON object, too long, or does not arrive in time, and when `take` fails.
    pub async fn take<T: Send + 'static>(
        &self,
        request: Request<Body>,
        take: impl FnOnce(Fields) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let json = request.headers().get(header::CONTENT_TYPE).is_some_and(|kind| {
            let kind = kind.to_str().unwrap_or_default();
            let essence = kind.split(';').next().unwrap_or_default().trim();
            essence.eq_ignore_ascii_case("application/json")
        });
        // A page of another site could send any other type without asking the server first.
        if !json {
            return Err(ApiError::not_json());
        }
        let body = tokio::time::timeout(BODY_TIME, self.bodies.read(request.into_body())).await;
        let body = body.map_err(|_| ApiError::slow_body())??;
        // The semaphore is never closed.
        let place = Arc::clone(&self.takers).acquire_owned().await;
        let place = place.map_err(|_| ApiError::internal("a mistake of this server"))?;
        let taken = tokio::task::spawn_blocking(move || {
            let taken = Fields::parse(&body.bytes).and_then(take);
            // Held even if the client goes away meanwhile.
            drop((body, place));
            taken
        });
        let taken = taken.await;
        taken.unwrap_or_else(|_| Err(ApiError::internal("a mistake of this server")))
    }
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

//! The server: its paths, its beginning and its end.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    http::{HeaderValue, Uri},
    middleware::from_fn_with_state,
    routing::{get, post},
};
use tokio::{net::TcpListener, time::sleep};
use tower_http::cors::{AllowOrigin, Any, CorsLayer};

use super::{
    app::{App, Loaded, Settings},
    chat::chat_completions,
    completions::completions,
    connections::{self, Limits},
    error::ApiError,
    guard::guard,
    info,
    page::page,
    text,
};
use crate::{Interrupt, progress::note, serve::metrics::Metrics};

/// How often the server looks whether it is to stop.
const LOOK: Duration = Duration::from_millis(50);

/// What keeps a server from serving.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// The address cannot be had.
    #[error("cannot listen on {address} (--host, --port)")]
    Listen {
        /// Host and port.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// An origin is none.
    #[error("--cors {0}: expected * or an origin such as https://example.org")]
    Origin(String),
    /// The system fails.
    #[error("the server fails")]
    Io(#[from] io::Error),
}

/// A server that listens.
pub struct Server {
    listener: TcpListener,
    app: Arc<App>,
    router: Router,
}

impl Server {
    /// Listens. Requests are answered once [`Self::serve`] runs.
    ///
    /// # Errors
    /// When the address cannot be had, or a setting is none.
    pub async fn bind(
        host: &str,
        port: u16,
        mut settings: Settings,
        metrics: Arc<Metrics>,
    ) -> Result<Self, ServerError> {
        let listen = |source| ServerError::Listen {
            address: format!("{host}:{port}"),
            source,
        };
        let listener = TcpListener::bind((host, port)).await.map_err(listen)?;
        let address = listener.local_addr()?;
        settings.loopback_only = address.ip().is_loopback() && settings.api_keys.is_empty();
        let cors = cors(&settings.cors)?;
        let app = Arc::new(App::new(settings, metrics));
        let router = router(&app, cors);
        Ok(Self { listener, app, router })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// When the system does not know.
    pub fn address(&self) -> Result<SocketAddr, ServerError> {
        Ok(self.listener.local_addr()?)
    }

    /// Answers requests until it is asked to stop: with an error until `load` has given the model, which runs beside.
    /// Then nothing new is taken, and what runs is done first, for `grace` at most.
    ///
    /// # Errors
    /// When `load` or the system fails.
    pub async fn serve<E>(
        self,
        load: impl FnOnce() -> Result<Loaded, E> + Send + 'static,
        interrupt: Interrupt,
        grace: Duration,
    ) -> Result<(), E>
    where
        E: From<ServerError> + Send + 'static,
    {
        let Self { listener, app, router } = self;
        let stopping = interrupt.clone();
        let asked = async move {
            while stopping.raised().is_none() {
                sleep(LOOK).await;
            }
        };
        let served = tokio::spawn(connections::serve(listener, router, Limits::default(), asked));
        let loading = tokio::task::spawn_blocking(load);
        let loaded = loading.await.map_err(|e| ServerError::Io(io::Error::other(e)))?;
        let loaded = loaded?;
        let (slots, context) = (loaded.engine.options().parallel, loaded.engine.context());
        app.load(loaded);
        // Who waits for this line asks at once.
        note(&format!("ready: {slots} slots of {context} tokens"));
        let patience = async {
            while interrupt.raised().is_none() {
                sleep(LOOK).await;
            }
            sleep(grace).await;
        };
        tokio::select! {
            done = served => {
                done.map_err(|e| ServerError::Io(io::Error::other(e)))?;
            }
            () = patience => {}
        }
        // Whoever still holds the model is about to let go of it: the scheduler ends with the last of them.
        if let Some(loaded) = app.unload().and_then(Arc::into_inner) {
            let stopped = tokio::task::spawn_blocking(move || loaded.engine.stop());
            // Answers whose clients have gone end within a step.
            stopped.await.map_err(|e| ServerError::Io(io::Error::other(e)))?;
        }
        Ok(())
    }
}

fn router(app: &Arc<App>, cors: Option<CorsLayer>) -> Router {
    let router = Router::new()
        .route("/", get(page))
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/completions", post(completions))
        .route("/v1/models", get(info::models))
        .route("/v1/models/{*name}", get(info::model))
        .route("/health", get(info::health))
        .route("/metrics", get(info::metrics))
        .route("/props", get(info::props))
        .route("/tokenize", post(text::tokenize))
        .route("/detokenize", post(text::detokenize))
        .fallback(|uri: Uri| async move { ApiError::no_such_path(uri.path()) })
        .method_not_allowed_fallback(|| async { ApiError::wrong_method() })
        .layer(from_fn_with_state(Arc::clone(app), guard))
        .with_state(Arc::clone(app));
    // Outermost: a browser asks what it may send without a key.
    match cors {
        Some(cors) => router.layer(cors),
        None => router,
    }
}

fn cors(origins: &[String]) -> Result<Option<CorsLayer>, ServerError> {
    if origins.is_empty() {
        return Ok(None);
    }
    let allowed = if origins.iter().any(|o| o == "*") {
        AllowOrigin::any()
    } else {
        let origin = |o: &String| {
            let plain = o.starts_with("http://") || o.starts_with("https://");
            let value = HeaderValue::from_str(o).ok().filter(|_| plain);
            value.ok_or_else(|| ServerError::Origin(o.clone()))
        };
        AllowOrigin::list(origins.iter().map(origin).collect::<Result<Vec<_>, _>>()?)
    };
    let layer = CorsLayer::new()
        .allow_origin(allowed)
        .allow_methods(Any)
        .allow_headers(Any);
    Ok(Some(layer))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
    };

    use super::*;

    fn settings() -> Settings {
        Settings {
            max_body: 1 << 20,
            api_keys: Vec::new(),
            cors: Vec::new(),
            loopback_only: false,
            log: false,
            log_prompts: false,
        }
    }

    async fn said_to(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut said = String::new();
        stream.read_to_string(&mut said).await.unwrap();
        said
    }

    #[tokio::test]
    async fn while_the_model_is_loaded_requests_are_told_so() {
        let server = Server::bind("127.0.0.1", 0, settings(), Arc::default()).await.unwrap();
        let address = server.address().unwrap();
        let (go_on, wait) = channel::<()>();
        let load = move || {
            wait.recv().unwrap();
            Err::<Loaded, _>(ServerError::Origin("none".to_owned()))
        };
        let served = tokio::spawn(server.serve(load, Interrupt::default(), Duration::ZERO));
        for path in ["/health", "/v1/models", "/props"] {
            let said = said_to(address, path).await;
            assert!(
                said.starts_with("HTTP/1.1 503") && said.contains("retry-after: 1"),
                "{said}"
            );
            assert!(
                said.contains("the model is being loaded") && said.contains("unavailable_error"),
                "{said}"
            );
        }
        for path in ["/", "/metrics"] {
            assert!(said_to(address, path).await.starts_with("HTTP/1.1 200"), "{path}");
        }
        go_on.send(()).unwrap();
        // What keeps the model from being loaded ends the server.
        let error = served.await.unwrap().unwrap_err();
        assert!(matches!(error, ServerError::Origin(_)), "{error}");
    }

    #[tokio::test]
    async fn an_address_that_cannot_be_had_is_named() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = taken.local_addr().unwrap().port();
        // 203.0.113.0/24 is for documents: no machine has it.
        for (host, port) in [("127.0.0.1", port), ("203.0.113.7", 0), ("no such host", 0)] {
            let error = Server::bind(host, port, settings(), Arc::default())
                .await
                .err()
                .unwrap();
            let message = error.to_string();
            assert_eq!(message, format!("cannot listen on {host}:{port} (--host, --port)"));
        }
    }
}

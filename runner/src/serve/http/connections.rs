//! Connections: so many at a time, and none that keeps its place without saying or reading anything.

use std::{future::Future, io, pin::pin, sync::Arc, time::Duration};

use axum::Router;
use hyper::server::conn::http1::Builder;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::sleep,
};
use tokio_io_timeout::TimeoutStream;

/// How connections are kept.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections at a time; more wait to be accepted.
    pub most: usize,
    /// Time for the head of a request, and for an answer to be taken further.
    pub patience: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            most: 1024,
            patience: Duration::from_secs(60),
        }
    }
}

/// The most bytes of a request's head, and of what is buffered of a body.
const MOST_HEAD: usize = 64 << 10;

/// Pause after a connection could not be accepted, for instance because the process has no more files.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves connections until `stop` is done; then requests that run are answered, and idle connections closed.
pub async fn serve(listener: TcpListener, router: Router, limits: Limits, stop: impl Future<Output = ()>) {
    let places = Arc::new(Semaphore::new(limits.most));
    let graceful = GracefulShutdown::new();
    let mut stop = pin!(stop);
    loop {
        let next = async {
            // The semaphore is never closed.
            let place = Arc::clone(&places).acquire_owned().await.ok()?;
            Some((listener.accept().await, place))
        };
        let next = tokio::select! {
            next = next => next,
            () = &mut stop => break,
        };
        match next {
            Some((Ok((stream, _)), place)) => connect(stream, place, &router, limits, &graceful),
            Some((Err(e), _)) if is_the_clients(&e) => {}
            _ => sleep(PAUSE).await,
        }
    }
    drop(listener);
    graceful.shutdown().await;
}

/// Whether an error is of one connection, not of all.
fn is_the_clients(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

fn connect(
    stream: TcpStream,
    place: OwnedSemaphorePermit,
    router: &Router,
    limits: Limits,
    graceful: &GracefulShutdown,
) {
    // Tokens are small and wait for nobody. Where the system refuses, they come a little later.
    let _: io::Result<()> = stream.set_nodelay(true);
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(limits.patience));
    let mut builder = Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(limits.patience)
        .max_buf_size(MOST_HEAD);
    let service = TowerToHyperService::new(router.clone());
    let connection = builder.serve_connection(TokioIo::new(Box::pin(stream)), service);
    let connection = graceful.watch(connection);
    tokio::spawn(async move {
        // What ends a connection early is the client's affair.
        let _: Result<(), hyper::Error> = connection.await;
        drop(place);
    });
}

#[cfg(test)]
mod tests {
    use std::{
        convert::Infallible,
        sync::atomic::{AtomicBool, Ordering},
        time::Instant,
    };

    use axum::{
        body::{Body, Bytes},
        routing::get,
    };
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// Notes that it was dropped.
    struct Ends(Arc<AtomicBool>);

    impl Drop for Ends {
        fn drop(&mut self) {
            self.0.store(true, Ordering::SeqCst);
        }
    }

    fn endless(ends: Ends) -> Body {
        let next = |ends| async move { Some((Ok::<_, Infallible>(Bytes::from(vec![0; 1 << 16])), ends)) };
        Body::from_stream(futures_util::stream::unfold(ends, next))
    }

    async fn connected(most: usize) -> (TcpListener, std::net::SocketAddr, Limits) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let patience = Duration::from_millis(200);
        (listener, address, Limits { most, patience })
    }

    #[tokio::test]
    async fn who_says_nothing_or_reads_nothing_is_cut_off() {
        let (listener, address, limits) = connected(2).await;
        let ended = Arc::new(AtomicBool::new(false));
        let noted = Arc::clone(&ended);
        let router = Router::new()
            .route("/", get(move || async move { endless(Ends(noted)) }))
            .route("/ok", get(|| async { "ok" }));
        tokio::spawn(serve(listener, router, limits, std::future::pending()));
        let mut silent = TcpStream::connect(address).await.unwrap();
        silent.write_all(b"GET /ok HTTP/1.1\r\nHost: a").await.unwrap();
        let mut deaf = TcpStream::connect(address).await.unwrap();
        deaf.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        // Both places are taken; a third client gets one once they are cut off.
        let mut third = TcpStream::connect(address).await.unwrap();
        third.write_all(b"GET /ok HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        let mut said = [0; 12];
        let read = tokio::time::timeout(Duration::from_secs(20), third.read_exact(&mut said)).await;
        read.unwrap().unwrap();
        assert_eq!(&said, b"HTTP/1.1 200");
        let started = Instant::now();
        while !ended.load(Ordering::SeqCst) {
            assert!(started.elapsed() < Duration::from_secs(20));
            sleep(Duration::from_millis(20)).await;
        }
        drop(deaf);
    }

    #[tokio::test]
    async fn stopping_answers_what_runs() {
        let (listener, address, limits) = connected(9).await;
        let router = Router::new().route(
            "/",
            get(|| async {
                sleep(Duration::from_millis(150)).await;
                "done"
            }),
        );
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let served = tokio::spawn(serve(listener, router, limits, async move {
            stopped.await.ok();
        }));
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        sleep(Duration::from_millis(50)).await;
        stop.send(()).unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.ends_with("done"), "{answer}");
        served.await.unwrap();
    }
}

//! What every request passes: the host that it names, the key, and a line in the log.

use std::{sync::Arc, time::Instant};

use axum::{
    body::Body,
    extract::State,
    http::{Request, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use subtle::{Choice, ConstantTimeEq};

use super::{app::App, error::ApiError};
use crate::progress::note;

/// Paths that need no key: the page asks for one itself, and who watches over the server has none.
const OPEN: [&str; 2] = ["/", "/health"];

pub async fn guard(State(app): State<Arc<App>>, request: Request<Body>, next: Next) -> Response {
    let started = Instant::now();
    let line = app
        .settings
        .log
        .then(|| format!("{} {}", request.method(), request.uri().path()));
    let response = match admits(&app, &request) {
        Ok(()) => next.run(request).await,
        Err(e) => e.into_response(),
    };
    if let Some(line) = line {
        let time = started.elapsed().as_millis();
        note(&format!("{line} {} {time} ms", response.status().as_u16()));
    }
    response
}

fn admits(app: &App, request: &Request<Body>) -> Result<(), ApiError> {
    let header = |name| {
        request
            .headers()
            .get(name)
            .and_then(|v: &axum::http::HeaderValue| v.to_str().ok())
    };
    if app.settings.loopback_only {
        // A request has one host; what has several is a trick.
        let hosts: Vec<_> = request.headers().get_all(header::HOST).iter().collect();
        let host = match hosts.as_slice() {
            [host] => host.to_str().ok(),
            [] => request.uri().host(),
            _ => None,
        };
        if !is_loopback(host.unwrap_or_default()) {
            return Err(ApiError::foreign_host());
        }
    }
    let keys = &app.settings.api_keys;
    if keys.is_empty() || OPEN.contains(&request.uri().path()) {
        return Ok(());
    }
    let given = header(header::AUTHORIZATION).and_then(|v| v.split_once(' '));
    let given = given.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"));
    let given = given.map_or("", |(_, key)| key.trim());
    if is_one_of(given, keys) {
        Ok(())
    } else {
        Err(ApiError::key())
    }
}

/// Whether a key is one of these. The time that it takes tells no more than lengths.
fn is_one_of(given: &str, keys: &[String]) -> bool {
    let found = keys.iter().fold(Choice::from(0), |found, key| {
        found | given.as_bytes().ct_eq(key.as_bytes())
    });
    found.into()
}

/// Whether the host that a request names, with a port or without, is this machine by a loopback name.
fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or_default(),
        None => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    let address: Option<std::net::IpAddr> = name.parse().ok();
    name.eq_ignore_ascii_case("localhost") || address.is_some_and(|a| a.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_that_are_not_this_machine_are_told() {
        for host in [
            "localhost",
            "LOCALHOST:8080",
            "127.0.0.1:1",
            "127.0.0.1",
            "[::1]:8080",
            "[::1]",
        ] {
            assert!(is_loopback(host), "{host}");
        }
        for host in [
            "",
            "evil.example:8080",
            "127.0.0.1.evil.example",
            "10.0.0.1:80",
            "localhost.evil",
        ] {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn keys_are_equal_or_not() {
        let keys = ["abc".to_owned(), "other".to_owned()];
        assert!(is_one_of("abc", &keys) && is_one_of("other", &keys));
        assert!(!is_one_of("ab", &keys) && !is_one_of("", &keys) && !is_one_of("abd", &keys));
    }
}

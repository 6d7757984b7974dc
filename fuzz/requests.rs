//! What strangers send to the REST interface of a hub: a path, a query and a header.

use std::collections::BTreeMap;

use connect_hub::{
    limits::MAX_REST_PAGE,
    rest::asked::{Kind, Query, Route, bearer},
};
use connect_spec::ids::{AgentId, CredentialId, ServiceId, TunnelId};
use http::{HeaderMap, HeaderValue, StatusCode, header};

/// A path leads to one resource, and a resource has one path.
fn path(path: &str) {
    let Some(route) = Route::of(path) else { return };
    let (methods, _) = route.needs();
    assert!(methods.starts_with("GET") || methods == "DELETE");
    let spelled = match route {
        Route::OpenApi => "openapi.json".to_owned(),
        Route::Services => "services".to_owned(),
        Route::Agents => "agents".to_owned(),
        Route::Tunnels => "tunnels".to_owned(),
        Route::Tunnel(id) => format!("tunnels/{id}"),
        Route::Shares => "shares".to_owned(),
        Route::Audit => "audit".to_owned(),
        Route::Socket if path.ends_with('t') => "agent".to_owned(),
        Route::Socket => "tunnel".to_owned(),
    };
    assert_eq!(path, format!("/v1/{spelled}"));
}

/// What is taken of a query means what it says.
fn query(text: &str) {
    let parse = || match Query::parse(text) {
        Ok(query) => Some(query),
        Err(problem) => {
            assert_eq!(problem.status, StatusCode::BAD_REQUEST);
            None
        }
    };
    let Some(query) = parse() else { return };
    // Each parameter once, and none that nobody took.
    let pairs: Vec<_> = text.split('&').filter(|pair| !pair.is_empty()).collect();
    assert_eq!(query.end().is_ok(), pairs.is_empty());
    let plain: BTreeMap<_, _> = pairs.iter().filter_map(|pair| pair.split_once('=')).collect();
    let is_plain = |text: &str| !text.contains(['%', '+']);
    let again = || parse().expect("it was parsed before");

    if let Ok(limit) = again().limit() {
        assert!((1..=MAX_REST_PAGE).contains(&limit));
    }
    for name in ["cursor", "since", "until"] {
        if let Ok(Some(number)) = again().number(name)
            && let Some(value) = plain.get(name).filter(|value| is_plain(value))
        {
            assert_eq!(number.to_string(), **value, "a number has one spelling");
        }
    }
    let _ = again().take::<Kind>("kind");
    let id = |shown: Option<String>| {
        if let Some(shown) = shown
            && let Some(value) = plain.get("cursor").filter(|value| is_plain(value))
        {
            assert_eq!(shown, **value, "an id has one spelling");
        }
    };
    let shown = |id: AgentId| id.to_string();
    id(again().take("cursor").ok().flatten().map(shown));
    id(again().take("cursor").ok().flatten().map(|id: ServiceId| id.to_string()));
    id(again().take("cursor").ok().flatten().map(|id: TunnelId| id.to_string()));
    id(again().take("cursor").ok().flatten().map(|id: CredentialId| id.to_string()));
}

/// A key is read as it was written, and from `Bearer` alone.
fn authorization(value: &[u8]) {
    let Ok(value) = HeaderValue::from_bytes(value) else { return };
    let headers = HeaderMap::from_iter([(header::AUTHORIZATION, value.clone())]);
    if let Some(key) = bearer(&headers) {
        let text = value.to_str().expect("a key is ASCII");
        assert!(text.get(..7).is_some_and(|scheme| scheme.eq_ignore_ascii_case("bearer ")));
        assert_eq!(text[7..].trim(), key.reveal());
    }
}

/// The input is a path, a line with a query, and the value of a header.
pub(crate) fn run(input: &[u8]) {
    let mut lines = input.splitn(3, |byte| *byte == b'\n');
    let mut next = || lines.next().unwrap_or_default();
    let (first, second, third) = (next(), next(), next());
    if let (Ok(first), Ok(second)) = (std::str::from_utf8(first), std::str::from_utf8(second)) {
        path(first);
        query(second);
    }
    authorization(third);
}

/// What a client would send.
pub(crate) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let id = "5c".repeat(16);
    let key = format!("Bearer pck_{}", "ab".repeat(32));
    vec![
        ("services", format!("/v1/services\nlimit=100&cursor={id}\n{key}").into_bytes()),
        (
            "audit",
            format!("/v1/audit\ncursor=7&since=1800000000000&until=0&kind=tunnel_cut&agent_id={id}\n{key}")
                .into_bytes(),
        ),
        ("cut", format!("/v1/tunnels/{id}\n\nbearer  x").into_bytes()),
    ]
}

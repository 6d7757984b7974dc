//! The HTTP surface: two WebSocket upgrades for agents and what [`rest`](crate::rest) gives to programs,
//! two health checks for operators.

use std::sync::Arc;

use connect_spec::{
    control::{TICKET_SCHEME, Ticket},
    encoding::Encoding,
};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use hyper::upgrade::OnUpgrade;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use warp::{
    Filter,
    filters::BoxedFilter,
    reply::{Reply, Response},
};

use crate::{
    hub::Hub,
    limits::READY_LIMIT,
    metrics::{CONTENT_TYPE, Credential},
    rest,
    router::ClaimError,
    server::{Next, Visitor},
    tunnel::Admitted,
};

/// Length of a `Sec-WebSocket-Key`: 16 bytes in base64 (RFC 6455 section 4.1).
const KEY_CHARS: usize = 24;

/// What agents and programs are served: `GET /v1/agent`, `GET /v1/tunnel`, and the rest.
#[must_use]
pub fn agents(hub: Arc<Hub>) -> BoxedFilter<(Response,)> {
    let upgrade = || {
        warp::header::headers_cloned()
            .and(warp::ext::get::<Visitor>())
            .and(warp::ext::optional::<OnUpgrade>())
    };
    let agent = warp::path!("v1" / "agent").and(warp::get()).and(upgrade()).map(agent);
    let rest = rest::routes(Arc::clone(&hub));
    let tunnel = warp::path!("v1" / "tunnel")
        .and(warp::get())
        .and(upgrade())
        .map(move |headers, visitor, on_upgrade| tunnel(&hub, &headers, &visitor, on_upgrade));
    agent.or(tunnel).unify().or(rest).unify().boxed()
}

/// What operators are served: `GET /healthz` while the process lives, `GET /readyz` while it is of use,
/// `GET /metrics` for what is counted.
#[must_use]
pub fn admin(hub: Arc<Hub>) -> BoxedFilter<(Response,)> {
    let health = warp::path!("healthz").and(warp::get()).map(|| "ok\n".into_response());
    let counting = Arc::clone(&hub);
    let ready = warp::path!("readyz").and(warp::get()).then(move || ready(Arc::clone(&hub)));
    let metrics =
        warp::path!("metrics").and(warp::get()).then(move || metrics(Arc::clone(&counting)));
    health.or(ready).unify().or(metrics).unify().boxed()
}

async fn ready(hub: Arc<Hub>) -> Response {
    let refuse = |why: &'static str| {
        warp::reply::with_status(why, StatusCode::SERVICE_UNAVAILABLE).into_response()
    };
    if hub.is_draining() {
        return refuse("draining\n");
    }
    if !hub.store().is_up() {
        refuse("the database is away\n")
    } else if database_answers(&hub).await {
        "ready\n".into_response()
    } else {
        refuse("the database does not answer\n")
    }
}

async fn database_answers(hub: &Hub) -> bool {
    matches!(timeout(READY_LIMIT, hub.store().ping()).await, Ok(Ok(())))
}

async fn metrics(hub: Arc<Hub>) -> Response {
    let database_up = database_answers(&hub).await;
    let text = hub.metrics().show(&hub.moment(database_up));
    warp::reply::with_header(text, header::CONTENT_TYPE, CONTENT_TYPE).into_response()
}

fn agent(headers: HeaderMap, visitor: Visitor, on_upgrade: Option<OnUpgrade>) -> Response {
    let (accept, on_upgrade) = match handshake(&headers, on_upgrade) {
        Ok(handshake) => handshake,
        Err(refusal) => return refusal.into_response(),
    };
    visitor.upgrade(on_upgrade, Next::Agent);
    switch(&accept, None)
}

fn tunnel(
    hub: &Arc<Hub>,
    headers: &HeaderMap,
    visitor: &Visitor,
    on_upgrade: Option<OnUpgrade>,
) -> Response {
    let (accept, on_upgrade) = match handshake(headers, on_upgrade) {
        Ok(handshake) => handshake,
        Err(refusal) => return refusal.into_response(),
    };
    let Some(encoding) =
        tokens(headers, header::SEC_WEBSOCKET_PROTOCOL).find_map(Encoding::from_subprotocol)
    else {
        return Refusal(StatusCode::BAD_REQUEST, "no subprotocol that this hub speaks\n")
            .into_response();
    };
    let claim = match ticket(headers) {
        Some(ticket) => {
            hub.route(|router, _| router.handle_claim(&ticket, encoding, std::time::Instant::now()))
        }
        None => Err(ClaimError::Unknown),
    };
    match claim {
        Ok(claim) => {
            visitor.upgrade(on_upgrade, Next::Tunnel(Admitted::new(Arc::clone(hub), claim)));
            switch(&accept, Some(encoding))
        }
        Err(ClaimError::Unknown) => {
            hub.metrics().note_failure(Credential::Ticket);
            visitor.note_failure();
            Refusal(StatusCode::UNAUTHORIZED, "the ticket is not valid\n").into_response()
        }
        Err(ClaimError::Encoding) => {
            Refusal(StatusCode::BAD_REQUEST, "the tunnel has another encoding\n").into_response()
        }
    }
}

/// A request that is no upgrade that we take.
#[derive(Debug)]
struct Refusal(StatusCode, &'static str);

impl Refusal {
    fn into_response(self) -> Response {
        let mut response = warp::reply::with_status(self.1, self.0).into_response();
        if self.0 == StatusCode::UPGRADE_REQUIRED {
            let headers = response.headers_mut();
            headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
            headers.insert(header::SEC_WEBSOCKET_VERSION, HeaderValue::from_static("13"));
        }
        response
    }
}

/// The client's side of the opening handshake, checked: the value of `Sec-WebSocket-Accept`, and the
/// connection to upgrade.
fn handshake(
    headers: &HeaderMap,
    on_upgrade: Option<OnUpgrade>,
) -> Result<(String, OnUpgrade), Refusal> {
    let wants_websocket = tokens(headers, header::UPGRADE)
        .any(|token| token.eq_ignore_ascii_case("websocket"))
        && tokens(headers, header::CONNECTION).any(|token| token.eq_ignore_ascii_case("upgrade"));
    let version = headers.get(header::SEC_WEBSOCKET_VERSION).map(HeaderValue::as_bytes);
    let Some(on_upgrade) = on_upgrade.filter(|_| wants_websocket && version == Some(b"13")) else {
        return Err(Refusal(StatusCode::UPGRADE_REQUIRED, "this is a WebSocket endpoint\n"));
    };
    let key = headers.get(header::SEC_WEBSOCKET_KEY).map(HeaderValue::as_bytes);
    match key.filter(|key| key.len() == KEY_CHARS) {
        Some(key) => Ok((derive_accept_key(key), on_upgrade)),
        None => {
            Err(Refusal(StatusCode::BAD_REQUEST, "Sec-WebSocket-Key is missing or malformed\n"))
        }
    }
}

/// The comma-separated tokens of all headers of a name.
fn tokens(headers: &HeaderMap, name: header::HeaderName) -> impl Iterator<Item = &str> {
    headers
        .get_all(name)
        .into_iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
}

/// The ticket in `Authorization: Ticket HEX`.
fn ticket(headers: &HeaderMap) -> Option<Ticket> {
    let (scheme, ticket) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case(TICKET_SCHEME).then(|| Ticket::parse(ticket.trim())).flatten()
}

/// `101 Switching Protocols`.
fn switch(accept: &str, encoding: Option<Encoding>) -> Response {
    let mut response = StatusCode::SWITCHING_PROTOCOLS.into_response();
    let headers = response.headers_mut();
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    if let Ok(accept) = HeaderValue::from_str(accept) {
        headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    }
    if let Some(encoding) = encoding {
        headers.insert(
            header::SEC_WEBSOCKET_PROTOCOL,
            HeaderValue::from_static(encoding.subprotocol()),
        );
    }
    response
}

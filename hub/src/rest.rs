//! What programs read of a workspace over HTTP, with an API key.
//!
//! The hub shows what it has: opaque ids and sealed records. What they are called, `connect … --json`
//! knows. `rest/openapi.json` describes each route and answer; a test holds the answers against it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use connect_spec::{
    audit::{ApiKeyId, AuditHash, Event},
    bytes::Blob,
    control::{ListedAgent, PresentedBlobs, SealedRecord},
    encoding::Encoding,
    ids::{AgentId, CredentialId, ServiceId, TunnelId, WorkspaceId},
    objects::{AgentRole, Certificate, Credential, UnixTime},
    signed::Signed,
};
use http::{HeaderMap, Method, StatusCode};
use serde::Serialize;
use warp::{
    Filter,
    filters::BoxedFilter,
    path::FullPath,
    reply::{Reply as _, Response},
};

use crate::{
    api_keys,
    bucket::Bucket,
    hub::{Hub, LiveTunnel},
    limits::{API_KEY_BURST, API_KEY_RATE, MAX_REST_KEYS},
    metrics,
    problem::{Problem, document, json},
    requests::store_trouble,
    server::Visitor,
    store::{AuditFilter, Authorized, StoreError},
};

pub mod asked;

use asked::{Kind, Query, Route, bearer};

/// The document that describes all this.
const OPENAPI: &str = include_str!("rest/openapi.json");

/// What API keys may still ask for.
#[derive(Debug, Default)]
pub struct Rates {
    buckets: Mutex<HashMap<ApiKeyId, Bucket>>,
}

impl Rates {
    fn check(&self, key: ApiKeyId, now: Instant) -> Result<(), Problem> {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.len() >= MAX_REST_KEYS {
            buckets.retain(|_, bucket| !bucket.is_full(now));
        }
        let bucket = buckets.entry(key).or_insert_with(|| Bucket::full(now));
        bucket.take(API_KEY_RATE, API_KEY_BURST, now).map_err(|wait| Problem {
            retry_in: Some(wait),
            ..Problem::new(StatusCode::TOO_MANY_REQUESTS, "this API key asks for too much")
        })
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Self {
        let report = store_trouble(&error);
        let status = if error.is_passing() {
            StatusCode::SERVICE_UNAVAILABLE
        } else {
            StatusCode::INTERNAL_SERVER_ERROR
        };
        Self { retry_in: Some(Duration::from_secs(1)), ..Self::new(status, report.message) }
    }
}

/// Everything under `/v1/` that is no WebSocket, and whatever else is not there.
#[must_use]
pub fn routes(hub: Arc<Hub>) -> BoxedFilter<(Response,)> {
    warp::method()
        .and(warp::path::full())
        .and(warp::query::raw().or(warp::any().map(String::new)).unify())
        .and(warp::header::headers_cloned())
        .and(warp::ext::get::<Visitor>())
        .then(move |method, path: FullPath, query, headers, visitor| {
            let hub = Arc::clone(&hub);
            async move {
                let request = Request { method, path: path.as_str(), query, headers, visitor };
                Box::pin(answer(&hub, request)).await.unwrap_or_else(Problem::into_response)
            }
        })
        .boxed()
}

/// What is asked, and by whom.
struct Request<'r> {
    method: Method,
    path: &'r str,
    query: String,
    headers: HeaderMap,
    visitor: Visitor,
}

async fn answer(hub: &Hub, request: Request<'_>) -> Result<Response, Problem> {
    let Request { method, path, query, headers, visitor } = request;
    let route = Route::of(path).ok_or_else(Problem::not_found)?;
    let (methods, scope) = route.needs();
    if !methods.split(", ").any(|allowed| allowed == method.as_str()) {
        let detail = format!("this resource has {methods}");
        let problem = Problem::new(StatusCode::METHOD_NOT_ALLOWED, detail);
        return Err(Problem { allow: Some(methods), ..problem });
    }
    if let Route::OpenApi = route {
        return Ok(document(StatusCode::OK, "application/json", OPENAPI.to_owned()));
    }
    let Some((workspace, key)) = authorize(hub, &headers).await? else {
        hub.metrics().note_failure(metrics::Credential::ApiKey);
        visitor.note_failure();
        return Err(Problem::new(StatusCode::UNAUTHORIZED, "show a valid API key"));
    };
    visitor.admit();
    hub.rates().check(key.key_id, Instant::now())?;
    if !key.scopes.contains(&scope) {
        return Err(Problem::new(StatusCode::FORBIDDEN, "this API key has not the scope for it"));
    }
    let query = Query::parse(&query)?;
    match route {
        Route::Services => services(hub, workspace, query).await,
        Route::Agents => agents(hub, workspace, query).await,
        Route::Tunnels => tunnels(hub, workspace, query),
        Route::Tunnel(tunnel) => cut(hub, workspace, key.key_id, tunnel, query),
        Route::Shares => shares(hub, workspace, query).await,
        Route::Audit => audit_rows(hub, workspace, query).await,
        Route::OpenApi | Route::Socket => Err(Problem::not_found()),
    }
}

/// The key that the headers show, if it is worth anything.
async fn authorize(
    hub: &Hub,
    headers: &HeaderMap,
) -> Result<Option<(WorkspaceId, Authorized)>, StoreError> {
    match bearer(headers) {
        Some(key) => api_keys::authorize(hub, &key).await,
        None => Ok(None),
    }
}

/// A page of a list.
#[derive(Serialize)]
struct Page<T> {
    items: Vec<T>,
    /// The parameter `cursor` of the next page; absent when there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    next: Option<String>,
}

/// Answers with a page that was asked for with `limit`; the next one begins after the `id` of its last row.
fn page<R, I: ToString, T: Serialize>(
    rows: Vec<R>,
    limit: usize,
    id: impl Fn(&R) -> I,
    show: impl FnMut(R) -> Result<T, StoreError>,
) -> Result<Response, Problem> {
    let next = rows.last().filter(|_| rows.len() >= limit).map(|row| id(row).to_string());
    let items = rows.into_iter().map(show).collect::<Result<_, _>>()?;
    Ok(json(StatusCode::OK, "application/json", &Page { items, next }))
}

fn rows(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}

async fn services(
    hub: &Hub,
    workspace: WorkspaceId,
    mut query: Query,
) -> Result<Response, Problem> {
    let (after, limit) = (query.take::<ServiceId>("cursor")?, query.limit()?);
    query.end()?;
    let mut tx = hub.store().snapshot(workspace).await?;
    let mut found = tx.services(after, rows(limit)).await?;
    hub.route(|router, _| {
        for row in &mut found {
            row.online = router.is_online(&(workspace, row.agent_id));
        }
    });
    page(found, limit, |row| row.service_id, Ok)
}

#[derive(Serialize)]
struct Agent {
    agent_id: AgentId,
    role: AgentRole,
    online: bool,
    joined_at: UnixTime,
    #[serde(flatten)]
    presented: PresentedBlobs,
    #[serde(skip_serializing_if = "Option::is_none")]
    record: Option<SealedRecord>,
}

async fn agents(hub: &Hub, workspace: WorkspaceId, mut query: Query) -> Result<Response, Problem> {
    let (after, limit) = (query.take::<AgentId>("cursor")?, query.limit()?);
    query.end()?;
    let mut tx = hub.store().snapshot(workspace).await?;
    let mut found = tx.agents(after, rows(limit)).await?;
    hub.route(|router, _| {
        for row in &mut found {
            row.online = router.is_online(&(workspace, row.agent_id));
        }
    });
    page(
        found,
        limit,
        |row| row.agent_id,
        |row| {
            let ListedAgent { agent_id, presented, record, online, joined_at } = row;
            let certificate: Signed<Certificate> = Signed::decode(&presented.certificate.0)
                .map_err(|_| StoreError::Corrupt("certificate"))?;
            let role = certificate.object().role;
            Ok(Agent { agent_id, role, online, joined_at, presented, record })
        },
    )
}

#[derive(Serialize)]
struct Tunnel {
    tunnel_id: TunnelId,
    service_id: ServiceId,
    agent_id: AgentId,
    peer_id: AgentId,
    #[serde(skip_serializing_if = "Option::is_none")]
    share_id: Option<CredentialId>,
    encoding: Encoding,
    opened_at: UnixTime,
    bytes_from_agent: u64,
    bytes_from_peer: u64,
}

fn tunnels(hub: &Hub, workspace: WorkspaceId, mut query: Query) -> Result<Response, Problem> {
    let (after, limit) = (query.take::<TunnelId>("cursor")?, query.limit()?);
    query.end()?;
    // Taken in full precision: the difference of two numbers of whole seconds would be another one from
    // request to request.
    let now = SystemTime::now();
    let opened_at = |since: Instant| {
        let opened = now.checked_sub(since.elapsed()).unwrap_or(UNIX_EPOCH);
        opened.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
    };
    let found = hub.live_tunnels(workspace, after, limit);
    page(
        found,
        limit,
        |row| row.joined.id,
        |LiveTunnel { joined, from_reacher, from_exposer }| {
            Ok(Tunnel {
                tunnel_id: joined.id,
                service_id: joined.parties.service,
                agent_id: joined.parties.reacher,
                peer_id: joined.parties.exposer,
                share_id: joined.parties.share,
                encoding: joined.encoding,
                opened_at: opened_at(joined.since),
                bytes_from_agent: from_reacher,
                bytes_from_peer: from_exposer,
            })
        },
    )
}

/// Cuts a tunnel. Its agents may open another one: whoever is to stay out is revoked, or the service is
/// exposed no longer.
fn cut(
    hub: &Hub,
    workspace: WorkspaceId,
    key_id: ApiKeyId,
    tunnel_id: TunnelId,
    query: Query,
) -> Result<Response, Problem> {
    query.end()?;
    if !hub.route(|router, out| router.handle_cut((workspace, tunnel_id), out)) {
        return Err(Problem::not_found());
    }
    hub.note(workspace, Event::TunnelCut { key_id, tunnel_id });
    Ok(StatusCode::NO_CONTENT.into_response())
}

#[derive(Serialize)]
struct Share {
    share_id: CredentialId,
    service_ids: Vec<ServiceId>,
    uses: u32,
    used: u32,
    join_until: UnixTime,
    certs_end: UnixTime,
    closed: bool,
    credential: Blob,
    /// Absent for a share that the hub knows from a login alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    record: Option<Blob>,
}

async fn shares(hub: &Hub, workspace: WorkspaceId, mut query: Query) -> Result<Response, Problem> {
    let (after, limit) = (query.take::<CredentialId>("cursor")?, query.limit()?);
    query.end()?;
    let mut tx = hub.store().snapshot(workspace).await?;
    let trust = hub.trust().current(&mut tx).await?.ok_or_else(Problem::not_found)?;
    let found = tx.shares(after, rows(limit)).await?;
    page(
        found,
        limit,
        |(id, _)| *id,
        |(share_id, row)| {
            let credential: Signed<Credential> =
                Signed::decode(&row.credential.0).map_err(|_| StoreError::Corrupt("credential"))?;
            let object = credential.object();
            Ok(Share {
                share_id,
                service_ids: object.services.clone().unwrap_or_default(),
                uses: object.uses,
                used: row.used,
                join_until: object.join_until,
                certs_end: object.certs_end,
                closed: trust.state.is_closed(&share_id),
                credential: row.credential,
                record: row.record,
            })
        },
    )
}

#[derive(Serialize)]
struct AuditRow {
    seq: u64,
    hash: AuditHash,
    event: serde_json::Value,
}

async fn audit_rows(
    hub: &Hub,
    workspace: WorkspaceId,
    mut query: Query,
) -> Result<Response, Problem> {
    let limit = query.limit()?;
    let filter = AuditFilter {
        after: query.number("cursor")?.unwrap_or(0),
        since: query.number("since")?,
        until: query.number("until")?,
        kind: query.take("kind")?.map(|Kind(kind)| kind),
        agent: query.take("agent_id")?,
    };
    query.end()?;
    let mut tx = hub.store().snapshot(workspace).await?;
    let found = tx.audit_rows(&filter, rows(limit)).await?;
    page(
        found,
        limit,
        |row| row.seq,
        |row| {
            let event =
                serde_json::from_str(&row.event).map_err(|_| StoreError::Corrupt("event"))?;
            Ok(AuditRow { seq: row.seq, hash: row.hash, event })
        },
    )
}

//! The accept loop: TCP, TLS, HTTP/1.1, and what follows an upgrade, in one task for each connection.
//!
//! warp routes; the loop owns everything below it, since the relay needs the upgraded stream itself.

use std::{
    convert::Infallible,
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{Arc, Mutex, OnceLock, PoisonError},
    task::{Context, Poll},
    time::Instant,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use hyper::{
    body::Incoming,
    server::conn::http1,
    service::{Service as _, service_fn},
    upgrade::OnUpgrade,
};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use nix::errno::Errno;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::{sleep, sleep_until, timeout},
};
use tokio_rustls::server::TlsStream;
use warp::{filters::BoxedFilter, reply::Response};

use crate::{
    control,
    doorman::{Doorman, Place, Reason, Refusal},
    forwarded::TrustedProxies,
    hub::{Hub, Phase},
    limits::{
        ACCEPT_PAUSE, DRAIN_LIMIT, ENTRY_LIMIT, FLOOD_LOG_INTERVAL, HEAD_TIMEOUT, MAX_BODY_BYTES,
        MAX_HEAD_BYTES,
    },
    problem::Problem,
    relay::Leg,
    tls::Tls,
    tunnel::{self, Admitted},
};

/// Who came by TLS once need not be sent to plain text again (RFC 6797).
const STRICT_TRANSPORT_SECURITY: HeaderValue = HeaderValue::from_static("max-age=31536000");

/// An accepted connection, below HTTP.
#[derive(Debug)]
pub enum Conn {
    /// Loopback, or behind a proxy that ends TLS.
    Plain(TcpStream),
    /// Boxed: the state of a TLS connection is a kilobyte.
    Tls(Box<TlsStream<TcpStream>>),
}

impl AsyncRead for Conn {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Tls(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Conn {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Self::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// What becomes of a connection after its upgrade.
#[derive(Debug)]
pub enum Next {
    /// A control socket.
    Agent,
    /// One end of a tunnel.
    Tunnel(Admitted),
}

/// Whoever is at the other end of a connection, or behind it; request handlers find it in the request's
/// extensions.
#[derive(Debug, Clone)]
pub struct Visitor {
    address: IpAddr,
    connection: Arc<Connection>,
}

/// What all requests of a connection share.
#[derive(Debug)]
struct Connection {
    doorman: Arc<Doorman>,
    /// Whether the connection comes from a trusted proxy.
    proxied: bool,
    /// The place among the strangers; given back at admission.
    place: Mutex<Option<Place>>,
    /// What each request is answered with, if the connection was over a limit when it came.
    refused: Option<Refusal>,
    /// What follows an upgrade, and for whom.
    next: OnceLock<Mutex<Option<(OnUpgrade, Next, IpAddr)>>>,
}

impl Visitor {
    /// Where the visitor comes from, as far as the hub can tell.
    #[must_use]
    pub fn address(&self) -> IpAddr {
        self.address
    }

    /// The other end proved who it is.
    pub fn admit(&self) {
        self.connection.place.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// The other end failed to prove who it is.
    pub fn note_failure(&self) {
        self.connection.doorman.note_failure(self.address, Instant::now());
    }

    /// Whether the other end may try to prove who it is.
    ///
    /// # Errors
    /// Its address has failed too often.
    pub fn may_try(&self) -> Result<(), Refusal> {
        self.connection.doorman.may_try(self.address, Instant::now())
    }

    /// What the connection's task does once the response is out.
    pub fn upgrade(&self, on_upgrade: OnUpgrade, next: Next) {
        // A connection is upgraded once.
        let _ = self.connection.next.set(Mutex::new(Some((on_upgrade, next, self.address))));
    }

    fn take_next(&self) -> Option<(OnUpgrade, Next, IpAddr)> {
        let next = self.connection.next.get()?;
        next.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The visitor of one request, who may be behind a proxy.
    fn of_request(&self, proxies: &TrustedProxies, headers: &HeaderMap) -> Self {
        let address = proxies.client(self.address, headers);
        Self { address, connection: Arc::clone(&self.connection) }
    }

    /// Whether a request of this visitor is served.
    fn enter(&self) -> Result<(), Refusal> {
        let mut place = self.connection.place.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(refusal) = self.connection.refused {
            return Err(refusal);
        }
        let (doorman, now) = (&self.connection.doorman, Instant::now());
        match place.as_mut() {
            Some(place) if self.connection.proxied => doorman.identify(place, self.address, now),
            Some(_) => doorman.may_try(self.address, now),
            // A proxy may use one connection for many: who proved something was one of them.
            None if self.connection.proxied => doorman.may_try(self.address, now),
            None => Ok(()),
        }
    }

    /// Returns when the visitor's time to authenticate is over, and never if it did.
    async fn outstays(&self, deadline: Instant) {
        sleep_until(deadline.into()).await;
        let place = self.connection.place.lock().unwrap_or_else(PoisonError::into_inner).is_some();
        if !place {
            std::future::pending().await
        }
    }
}

/// A bound socket and what is served on it.
#[derive(Debug)]
pub struct Server {
    /// Where connections come in.
    pub listener: TcpListener,
    /// Who may come in.
    pub doorman: Arc<Doorman>,
    /// What is served.
    pub service: Service,
}

/// What is served on a socket.
#[derive(Clone)]
pub struct Service {
    /// TLS, unless plain text is fine there.
    pub tls: Option<Arc<Tls>>,
    /// What requests are answered with.
    pub routes: BoxedFilter<(Response,)>,
    /// Who says for whom a connection comes.
    pub proxies: Arc<TrustedProxies>,
    /// Whether a connection that stays has to authenticate.
    pub must_authenticate: bool,
    /// When it ends.
    pub until: Phase,
}

impl std::fmt::Debug for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Service").field("until", &self.until).finish_non_exhaustive()
    }
}

/// Says that connections are dropped, and not too often.
#[derive(Debug, Default)]
struct FloodLog {
    dropped: u64,
    told: Option<Instant>,
}

impl FloodLog {
    fn note(&mut self, reason: Reason) {
        self.dropped += 1;
        if self.told.is_none_or(|told| told.elapsed() > FLOOD_LOG_INTERVAL) {
            self.told = Some(Instant::now());
            tracing::warn!(?reason, dropped = self.dropped, "too many unauthenticated connections");
        }
    }
}

impl Server {
    /// Serves until the hub is in phase [`Service::until`], then until the connections are gone, or a limit
    /// is over.
    pub async fn run(self, hub: Arc<Hub>) {
        let mut connections = JoinSet::new();
        let mut flood = FloodLog::default();
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                Some(_) = connections.join_next() => continue,
                () = hub.reached(self.service.until) => break,
            };
            match accepted {
                Ok((stream, peer)) => match self.greet(peer, &hub) {
                    Ok(visitor) => {
                        let service = self.service.clone();
                        connections.spawn(connection(Arc::clone(&hub), stream, visitor, service));
                    }
                    // Dropped at once: making it wait would cost a socket.
                    Err(reason) => {
                        hub.metrics().note_dropped(reason);
                        flood.note(reason);
                    }
                },
                Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                    Some(Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM) => {
                        tracing::warn!(%error, "cannot accept connections");
                        sleep(ACCEPT_PAUSE).await;
                    }
                    // The connection is gone before it was accepted: nobody's fault, nothing to do.
                    Some(_) | None => tracing::debug!(%error, "accept"),
                },
            }
        }
        drop(self.listener);
        let drained =
            timeout(DRAIN_LIMIT, async { while connections.join_next().await.is_some() {} }).await;
        if drained.is_err() {
            tracing::warn!(connections = connections.len(), "cutting connections that do not end");
        }
    }

    /// Finds a place for a newcomer.
    fn greet(&self, peer: SocketAddr, hub: &Hub) -> Result<Visitor, Reason> {
        let address = peer.ip().to_canonical();
        let proxied = self.service.proxies.trust(address);
        let known = (!proxied).then_some(address);
        let (place, refused) = self.doorman.accept(known, Instant::now())?;
        if let Some(refusal) = refused {
            hub.metrics().note_refused(refusal.reason);
        }
        let connection = Arc::new(Connection {
            doorman: Arc::clone(&self.doorman),
            proxied,
            place: Mutex::new(Some(place)),
            refused,
            next: OnceLock::new(),
        });
        Ok(Visitor { address, connection })
    }
}

/// One connection from its first byte to its last.
async fn connection(hub: Arc<Hub>, stream: TcpStream, visitor: Visitor, service: Service) {
    let deadline = Instant::now() + ENTRY_LIMIT;
    // Small frames must not wait for an acknowledgement.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "set TCP_NODELAY");
        return;
    }
    let conn = match service.tls.as_ref().map(|tls| tls.acceptor()) {
        None => Conn::Plain(stream),
        Some(acceptor) => match Box::pin(timeout(ENTRY_LIMIT, acceptor.accept(stream))).await {
            Ok(Ok(stream)) => Conn::Tls(Box::new(stream)),
            Ok(Err(error)) => {
                hub.metrics().note_tls_failure();
                return tracing::debug!(%error, "TLS");
            }
            Err(_) => {
                hub.metrics().note_tls_failure();
                return tracing::debug!("the TLS handshake took too long");
            }
        },
    };
    // A trusted proxy keeps connections for requests to come, and has time limits of its own.
    let must_authenticate = service.must_authenticate && !visitor.connection.proxied;
    // Boxed: HTTP is over when the sockets' long life begins, and its state should not stay for it.
    let serving = Box::pin(http(conn, visitor.clone(), service, &hub));
    tokio::select! {
        () = serving => {}
        () = visitor.outstays(deadline), if must_authenticate => {
            hub.metrics().note_late();
            return tracing::debug!("no request that leads anywhere in time");
        }
    }
    let Some((on_upgrade, next, address)) = visitor.take_next() else {
        return;
    };
    let Ok(upgraded) = on_upgrade.await else {
        return;
    };
    let Ok(parts) = upgraded.downcast::<TokioIo<Conn>>() else {
        return tracing::error!("an upgraded connection is not the one that was accepted");
    };
    let io = parts.io.into_inner();
    // Copied, so that hyper's larger buffer is freed.
    let early = Bytes::copy_from_slice(&parts.read_buf);
    match next {
        Next::Agent => {
            let visitor = Visitor { address, ..visitor };
            Box::pin(control::serve(hub, io, early, visitor)).await;
        }
        Next::Tunnel(admitted) => {
            visitor.admit();
            drop(visitor);
            Box::pin(tunnel::serve(admitted, Leg { io, early })).await;
        }
    }
}

async fn http(conn: Conn, visitor: Visitor, service: Service, hub: &Hub) {
    let strict = service.tls.is_some_and(|tls| tls.is_operators());
    let routes = TowerToHyperService::new(warp::service(service.routes));
    let answer = service_fn(move |mut request: http::Request<Incoming>| {
        let visitor = visitor.of_request(&service.proxies, request.headers());
        let refused = match visitor.enter() {
            Ok(()) => too_large(&request),
            Err(refusal) => {
                // What was refused when it came was counted then.
                if visitor.connection.refused.is_none() {
                    hub.metrics().note_refused(refusal.reason);
                }
                Some(come_later(&refusal))
            }
        };
        request.extensions_mut().insert(visitor);
        let routes = routes.clone();
        async move {
            let mut response = match refused {
                Some(refused) => refused,
                None => routes.call(request).await?,
            };
            if strict {
                let headers = response.headers_mut();
                headers.insert(header::STRICT_TRANSPORT_SECURITY, STRICT_TRANSPORT_SECURITY);
            }
            Ok::<_, Infallible>(response)
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(conn), answer)
        .with_upgrades();
    let mut connection = std::pin::pin!(connection);
    let result = tokio::select! {
        result = &mut connection => result,
        () = hub.reached(service.until) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(%error, "HTTP");
    }
}

/// Refuses a body that is longer than any that we read, or that does not say how long it is.
fn too_large(request: &http::Request<Incoming>) -> Option<Response> {
    let headers = request.headers();
    let length = headers.get(header::CONTENT_LENGTH).map(HeaderValue::to_str);
    let refusal = match length {
        Some(Ok(length)) if length.parse().is_ok_and(|length: u64| length <= MAX_BODY_BYTES) => {
            return None;
        }
        Some(_) => StatusCode::PAYLOAD_TOO_LARGE,
        None if headers.contains_key(header::TRANSFER_ENCODING) => StatusCode::LENGTH_REQUIRED,
        None => return None,
    };
    let detail = "the body is too long, or of unknown length";
    Some(last_answer(Problem::new(refusal, detail)))
}

/// `429 Too Many Requests`.
fn come_later(refusal: &Refusal) -> Response {
    let detail = "too many connections or failed tries from this address; come back later";
    let problem = Problem::new(StatusCode::TOO_MANY_REQUESTS, detail);
    last_answer(Problem { retry_in: Some(refusal.retry_in), ..problem })
}

/// An answer after which the connection ends.
fn last_answer(problem: Problem) -> Response {
    let mut response = problem.into_response();
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

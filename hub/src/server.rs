//! The accept loop: TCP, TLS, HTTP/1.1, and what follows an upgrade, in one task for each connection.
//!
//! warp routes; the loop owns everything below it, since the relay needs the upgraded stream itself.

use std::{
    convert::Infallible,
    io,
    net::IpAddr,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderValue, header};
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
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_rustls::server::TlsStream;
use warp::{filters::BoxedFilter, reply::Response};

use crate::{
    control,
    hub::{Hub, Phase},
    limits::{
        ACCEPT_PAUSE, DRAIN_LIMIT, FLOOD_LOG_INTERVAL, HEAD_TIMEOUT, MAX_HEAD_BYTES,
        MAX_UNAUTHENTICATED, TLS_TIMEOUT,
    },
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

/// Whoever is at the other end of a connection; request handlers find it in the request's extensions.
#[derive(Debug, Clone)]
pub struct Visitor {
    peer: IpAddr,
    /// The place among the unauthenticated; given back at admission.
    place: Arc<Mutex<Option<OwnedSemaphorePermit>>>,
    next: Arc<Mutex<Option<(OnUpgrade, Next)>>>,
}

impl Visitor {
    fn new(peer: IpAddr, place: OwnedSemaphorePermit) -> Self {
        Self { peer, place: Arc::new(Mutex::new(Some(place))), next: Arc::default() }
    }

    /// Where the connection comes from.
    #[must_use]
    pub fn peer(&self) -> IpAddr {
        self.peer
    }

    /// The other end proved who it is.
    pub fn admit(&self) {
        self.place.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// What the connection's task does once the response is out.
    pub fn upgrade(&self, on_upgrade: OnUpgrade, next: Next) {
        *self.next.lock().unwrap_or_else(PoisonError::into_inner) = Some((on_upgrade, next));
    }

    fn take_next(&self) -> Option<(OnUpgrade, Next)> {
        self.next.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// A bound socket and what is served on it.
#[derive(Debug)]
pub struct Server {
    /// Where connections come in.
    pub listener: TcpListener,
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
    /// When it ends.
    pub until: Phase,
}

impl std::fmt::Debug for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Service").field("until", &self.until).finish_non_exhaustive()
    }
}

impl Server {
    /// Serves until the hub is in phase [`Service::until`], then until the connections are gone, or a limit
    /// is over.
    pub async fn run(self, hub: Arc<Hub>) {
        let places = Arc::new(Semaphore::new(MAX_UNAUTHENTICATED));
        let mut connections = JoinSet::new();
        let (mut refused, mut told) = (0u64, None);
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                Some(_) = connections.join_next() => continue,
                () = hub.reached(self.service.until) => break,
            };
            match accepted {
                Ok((stream, peer)) => {
                    // Over the limit newcomers are dropped at once: making them wait would cost a socket each.
                    let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
                        refused += 1;
                        if told.is_none_or(|told: Instant| told.elapsed() > FLOOD_LOG_INTERVAL) {
                            told = Some(Instant::now());
                            tracing::warn!(
                                limit = MAX_UNAUTHENTICATED,
                                refused,
                                "too many unauthenticated connections"
                            );
                        }
                        continue;
                    };
                    let visitor = Visitor::new(peer.ip(), place);
                    let service = self.service.clone();
                    connections.spawn(connection(Arc::clone(&hub), stream, visitor, service));
                }
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
}

/// One connection from its first byte to its last.
async fn connection(hub: Arc<Hub>, stream: TcpStream, visitor: Visitor, service: Service) {
    // Small frames must not wait for an acknowledgement.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "set TCP_NODELAY");
        return;
    }
    let conn = match service.tls.as_ref().map(|tls| tls.acceptor()) {
        None => Conn::Plain(stream),
        Some(acceptor) => match Box::pin(timeout(TLS_TIMEOUT, acceptor.accept(stream))).await {
            Ok(Ok(stream)) => Conn::Tls(Box::new(stream)),
            Ok(Err(error)) => return tracing::debug!(%error, "TLS"),
            Err(_) => return tracing::debug!("TLS handshake took too long"),
        },
    };
    // Boxed: HTTP is over when the sockets' long life begins, and its state should not stay for it.
    Box::pin(http(conn, visitor.clone(), service, &hub)).await;
    let Some((on_upgrade, next)) = visitor.take_next() else {
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
        Next::Agent => Box::pin(control::serve(hub, io, early, visitor)).await,
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
        request.extensions_mut().insert(visitor.clone());
        let answered = routes.call(request);
        async move {
            let mut response = answered.await?;
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

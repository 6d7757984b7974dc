//! Throwaway TCP services: what an exposer exposes.

use std::{
    future::Future,
    net::{SocketAddr, TcpListener as StdListener},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    task::{AbortHandle, JoinSet},
    time::timeout,
};

use crate::{eventually, runtime};

/// A TCP service; stops, and cuts its connections, when dropped.
#[derive(Debug)]
pub struct Service {
    address: SocketAddr,
    accepted: Arc<AtomicUsize>,
    task: AbortHandle,
}

impl Service {
    /// Serves each connection with `serve`, on a port that the kernel chooses.
    pub fn start<F, S>(serve: S) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
        S: Fn(TcpStream) -> F + Send + 'static,
    {
        Self::start_on("127.0.0.1:0".parse().expect("an address"), serve)
    }

    /// Serves each connection with `serve`.
    pub fn start_on<F, S>(address: SocketAddr, serve: S) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
        S: Fn(TcpStream) -> F + Send + 'static,
    {
        let listener = StdListener::bind(address).expect("a free port");
        listener.set_nonblocking(true).expect("our own socket");
        let address = listener.local_addr().expect("it is bound");
        let accepted = Arc::new(AtomicUsize::new(0));
        let count = accepted.clone();
        let task = runtime().spawn(async move {
            let listener = TcpListener::from_std(listener).expect("our own socket");
            let mut connections = JoinSet::new();
            loop {
                tokio::select! {
                    accepted = listener.accept() => {
                        let (tcp, _) = accepted.expect("accepting goes on");
                        count.fetch_add(1, Ordering::SeqCst);
                        connections.spawn(serve(tcp));
                    }
                    Some(_) = connections.join_next() => {}
                }
            }
        });
        Self { address, accepted, task: task.abort_handle() }
    }

    /// Sends back what comes, and ends when the client does.
    #[must_use]
    pub fn echo() -> Self {
        Self::start(echo)
    }

    /// Speaks first, then echoes.
    #[must_use]
    pub fn greeting(banner: &'static [u8]) -> Self {
        Self::start(move |mut tcp| async move {
            if tcp.write_all(banner).await.is_ok() {
                echo(tcp).await;
            }
        })
    }

    /// Keeps all that comes, and answers `reply` only when the client has finished.
    #[must_use]
    pub fn answering_at_the_end(reply: &'static [u8]) -> (Self, Inbox) {
        let inbox = Inbox::default();
        let kept = inbox.clone();
        let service = Self::start(move |mut tcp| {
            let inbox = kept.clone();
            async move {
                let index = inbox.open();
                let mut buffer = vec![0; 64 * 1024];
                loop {
                    match tcp.read(&mut buffer).await {
                        Ok(0) => break inbox.end(index, true),
                        Ok(length) => inbox.add(index, &buffer[..length]),
                        Err(_) => return inbox.end(index, false),
                    }
                }
                // The client may be gone.
                let _ = tcp.write_all(reply).await;
            }
        });
        (service, inbox)
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Connections so far; the probe at `expose` is one.
    #[must_use]
    pub fn accepted(&self) -> usize {
        self.accepted.load(Ordering::SeqCst)
    }

    /// Waits for the probe that `expose` makes, so that what comes later can be counted.
    #[track_caller]
    pub fn probed(&self) -> usize {
        eventually("the exposer probed its target", || self.accepted() > 0);
        self.accepted()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn echo(mut tcp: TcpStream) {
    let (mut read, mut write) = tcp.split();
    // The end of either side ends the echo.
    if tokio::io::copy(&mut read, &mut write).await.is_ok() {
        let _ = write.shutdown().await;
    }
}

/// What a service received, connection by connection.
#[derive(Debug, Clone, Default)]
pub struct Inbox(Arc<Mutex<Vec<Received>>>);

/// What came over one connection.
#[derive(Debug, Clone, Default)]
pub struct Received {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// How it ended, if it did: cleanly or not.
    pub clean: Option<bool>,
}

impl Inbox {
    fn with<T>(&self, act: impl FnOnce(&mut Vec<Received>) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn open(&self) -> usize {
        self.with(|all| {
            all.push(Received::default());
            all.len() - 1
        })
    }

    fn add(&self, index: usize, bytes: &[u8]) {
        self.with(|all| all[index].bytes.extend_from_slice(bytes));
    }

    fn end(&self, index: usize, clean: bool) {
        self.with(|all| all[index].clean = Some(clean));
    }

    /// All connections that brought anything: a probe does not.
    #[must_use]
    pub fn received(&self) -> Vec<Received> {
        self.with(|all| all.iter().filter(|one| !one.bytes.is_empty()).cloned().collect())
    }
}

/// An address at which a connection attempt is neither accepted nor refused: the queue is full.
#[derive(Debug)]
pub struct Silent {
    address: SocketAddr,
    _listener: TcpListener,
    _queue: Vec<TcpStream>,
}

impl Silent {
    /// Fills the queue of a listener that never accepts.
    #[must_use]
    pub fn start() -> Self {
        runtime().block_on(async {
            let socket = TcpSocket::new_v4().expect("a socket");
            socket.bind("127.0.0.1:0".parse().expect("an address")).expect("a free port");
            let listener = socket.listen(1).expect("a bound socket");
            let address = listener.local_addr().expect("a bound socket");
            let mut queue = Vec::new();
            // A connection that is not through in this time found the queue full.
            let limit = Duration::from_millis(300);
            while let Ok(connected) = timeout(limit, TcpStream::connect(address)).await {
                queue.push(connected.expect("it is queued"));
            }
            Self { address, _listener: listener, _queue: queue }
        })
    }

    /// Where it does not answer.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

/// A port of this machine at which nobody listens. At an address of its own: a reacher, which here
/// runs on the same machine, would take the same port of 127.0.0.1 and be the target itself.
#[must_use]
pub fn closed_port() -> SocketAddr {
    StdListener::bind("127.0.0.2:0")
        .and_then(|listener| listener.local_addr())
        .expect("a free port")
}

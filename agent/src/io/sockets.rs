//! The sockets to the hub: where they lead, and how all of them are cut at once.
//!
//! A socket does not notice that its machine slept, or that its address went away: it waits, for up to
//! minutes. Whoever knows better cuts it here, and everything above sees a socket that failed.

use std::{
    io,
    net::{SocketAddr, UdpSocket},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use futures_util::task::AtomicWaker;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::watch,
};

use crate::engine::surroundings::Way;

/// The sockets to one hub; clones share them.
#[derive(Debug, Clone)]
pub(crate) struct Sockets(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    open: Mutex<Open>,
    /// Changes when all sockets are cut.
    cut: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Open {
    lines: Vec<Weak<Line>>,
    hub: Option<SocketAddr>,
}

/// What a socket and its owner both hold.
#[derive(Debug, Default)]
struct Line {
    is_cut: AtomicBool,
    reader: AtomicWaker,
    writer: AtomicWaker,
}

impl Sockets {
    pub(crate) fn new() -> Self {
        let open = Mutex::default();
        Self(Arc::new(Shared { open, cut: watch::Sender::new(0) }))
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.0.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a new connection one of those that are cut together.
    ///
    /// # Errors
    /// When the connection failed already.
    pub(crate) fn add(&self, tcp: TcpStream) -> io::Result<CuttableTcp> {
        let hub = tcp.peer_addr()?;
        let line = Arc::new(Line::default());
        let mut open = self.open();
        open.lines.retain(|line| line.strong_count() > 0);
        open.lines.push(Arc::downgrade(&line));
        open.hub = Some(hub);
        Ok(CuttableTcp { tcp, line })
    }

    /// Cuts every socket, and gives up dials that have begun.
    pub(crate) fn cut(&self) {
        for line in self.open().lines.drain(..).filter_map(|line| line.upgrade()) {
            line.is_cut.store(true, Ordering::Release);
            line.reader.wake();
            line.writer.wake();
        }
        self.0.cut.send_modify(|cuts| *cuts += 1);
    }

    /// Tells of each [`Sockets::cut`] from here on.
    pub(crate) fn cuts(&self) -> watch::Receiver<u64> {
        self.0.cut.subscribe()
    }

    /// How this machine would speak now to the hub where it was last found. Nothing is sent: the kernel only
    /// looks into its routes.
    pub(crate) fn way(&self) -> Way {
        let Some(hub) = self.open().hub else {
            return Way::Unknown;
        };
        own_address_towards(hub).map_or(Way::Closed, |address| Way::From(address.ip()))
    }
}

fn own_address_towards(hub: SocketAddr) -> io::Result<SocketAddr> {
    let any: SocketAddr = match hub {
        SocketAddr::V4(_) => ([0, 0, 0, 0], 0).into(),
        SocketAddr::V6(_) => ([0_u16; 8], 0).into(),
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect(hub)?;
    socket.local_addr()
}

/// A connection that fails when it is cut.
#[derive(Debug)]
pub(crate) struct CuttableTcp {
    tcp: TcpStream,
    line: Arc<Line>,
}

impl Line {
    /// `act`, unless the line is cut before it is ready.
    fn poll<T>(
        &self,
        waker: &AtomicWaker,
        context: &mut Context<'_>,
        act: impl FnOnce(&mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        let cut = || {
            let why = "the machine slept, or its network changed";
            Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionAborted, why)))
        };
        if self.is_cut.load(Ordering::Acquire) {
            return cut();
        }
        let polled = act(context);
        if polled.is_pending() {
            waker.register(context.waker());
            // It may have been cut before the waker was there.
            if self.is_cut.load(Ordering::Acquire) {
                return cut();
            }
        }
        polled
    }
}

impl AsyncRead for CuttableTcp {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Self { tcp, line } = self.get_mut();
        line.poll(&line.reader, context, |context| Pin::new(tcp).poll_read(context, buffer))
    }
}

impl AsyncWrite for CuttableTcp {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let Self { tcp, line } = self.get_mut();
        line.poll(&line.writer, context, |context| Pin::new(tcp).poll_write(context, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let Self { tcp, line } = self.get_mut();
        line.poll(&line.writer, context, |context| {
            Pin::new(tcp).poll_write_vectored(context, parts)
        })
    }

    fn is_write_vectored(&self) -> bool {
        self.tcp.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().tcp).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().tcp).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpListener,
    };

    async fn connected(sockets: &Sockets) -> (CuttableTcp, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
        (sockets.add(near.unwrap()).unwrap(), far.unwrap().0)
    }

    #[tokio::test]
    async fn cut_ends_reads_and_writes_that_wait_and_later_ones_live() {
        let sockets = Sockets::new();
        let (reading, _far) = connected(&sockets).await;
        let (writing, _full) = connected(&sockets).await;
        let (mut reader, _) = tokio::io::split(reading);
        let reader = tokio::spawn(async move { reader.read_u8().await });
        let (_, mut writer) = tokio::io::split(writing);
        // Nobody reads at the other end.
        let writer = tokio::spawn(async move { writer.write_all(&vec![0; 64 << 20]).await });
        let mut cuts = sockets.cuts();
        tokio::task::yield_now().await;
        sockets.cut();
        assert!(cuts.has_changed().unwrap());
        let aborted = io::ErrorKind::ConnectionAborted;
        assert_eq!(reader.await.unwrap().map_err(|error| error.kind()), Err(aborted));
        assert_eq!(writer.await.unwrap().map_err(|error| error.kind()), Err(aborted));

        let (mut near, mut far) = connected(&sockets).await;
        near.write_all(b"x").await.unwrap();
        assert_eq!(far.read_u8().await.unwrap(), b'x');
        cuts.borrow_and_update();
        assert!(!cuts.has_changed().unwrap());
    }

    #[tokio::test]
    async fn way_to_the_hub_is_from_an_own_address() {
        let sockets = Sockets::new();
        assert_eq!(sockets.way(), Way::Unknown, "no hub was dialled");
        let (near, _far) = connected(&sockets).await;
        assert_eq!(sockets.way(), Way::From("127.0.0.1".parse().unwrap()));
        drop(near);
        assert_eq!(sockets.way(), Way::From("127.0.0.1".parse().unwrap()));
    }
}

//! Joins a TCP connection and a stream, byte for byte, half-close by half-close, reset by reset.

use std::io;

use bytes::BufMut;
use connect_spec::record::ResetCode;
use tokio::{
    io::AsyncWriteExt,
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
};

use super::tunnel::Stream;

/// Most bytes moved at once; the buffer lives only while bytes move, so an idle connection has none.
const SPLICE_BYTES: usize = 64 * 1024;

/// Copies both ways until both directions ended, or one failed.
///
/// A connection that breaks resets the stream; a stream that was reset breaks the connection with
/// RST, so that a client never takes a cut answer for a whole one.
pub(crate) async fn splice(mut tcp: TcpStream, stream: &Stream) {
    let joined = {
        let (reader, writer) = tcp.split();
        // Both directions in one task: an error of either ends the other.
        tokio::try_join!(to_stream(reader, stream), to_tcp(stream, writer))
    };
    if let Err(error) = joined {
        tracing::debug!(%error, "connection broken");
        stream.reset(ResetCode::Aborted);
        // Without it the kernel would say a clean end of file. A socket that refuses is gone already.
        let _ = tcp.set_zero_linger();
    }
}

async fn to_stream(tcp: ReadHalf<'_>, stream: &Stream) -> io::Result<()> {
    loop {
        tcp.readable().await?;
        let room = stream.writable().await?;
        let most = room.min(SPLICE_BYTES);
        let mut buffer = Vec::with_capacity(most).limit(most);
        match tcp.try_read_buf(&mut buffer) {
            Ok(0) => return stream.finish(),
            Ok(_) => {
                stream.write_now(&buffer.into_inner())?;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
}

async fn to_tcp(stream: &Stream, mut tcp: WriteHalf<'_>) -> io::Result<()> {
    loop {
        let chunk = stream.read_chunk(SPLICE_BYTES).await?;
        if chunk.is_empty() {
            return tcp.shutdown().await;
        }
        tcp.write_all(&chunk).await?;
    }
}

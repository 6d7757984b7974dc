//! The first connection to a database, and in words what is wrong when there is none.

use std::io;

use sqlx::{
    Connection as _,
    postgres::{PgConnectOptions, PgConnection},
};

use super::StoreError;

/// Connects once, outside of the pool, which would try again and say only that it took too long.
///
/// # Errors
/// [`StoreError::Connect`].
pub async fn open(options: &PgConnectOptions) -> Result<PgConnection, StoreError> {
    PgConnection::connect_with(options).await.map_err(|source| {
        let (what, hint) = explain(&source);
        StoreError::Connect { what, hint, source }
    })
}

/// What is wrong, and what a person can do about it. Neither repeats anything of the URL.
fn explain(error: &sqlx::Error) -> (&'static str, &'static str) {
    if let sqlx::Error::Database(error) = error {
        return refused(error.code().as_deref());
    }
    if let sqlx::Error::Tls(error) = error {
        return match rustls_error(error.as_ref()) {
            Some(error) => distrusted(error),
            None => (
                "it speaks no TLS, or the file of `sslrootcert` holds no certificate",
                "turn TLS on at the server (`ssl = on`), or add `sslmode=disable` to the URL if the network is yours alone",
            ),
        };
    }
    if let sqlx::Error::Io(error) = error {
        return match error.get_ref().and_then(|inner| rustls_error(inner)) {
            Some(error) => distrusted(error),
            None => unreachable_because(error.kind()),
        };
    }
    if matches!(error, sqlx::Error::Configuration(_)) {
        return (
            "its URL cannot be used",
            "see which parameters of the URL are meant, such as sslcert with sslkey",
        );
    }
    ("it does not answer as PostgreSQL does", "see whether the URL names a PostgreSQL server")
}

/// The TLS library's own error among the causes.
fn rustls_error<'e>(error: &'e (dyn std::error::Error + 'static)) -> Option<&'e rustls::Error> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        cause = error.source();
    }
    None
}

fn refused(code: Option<&str>) -> (&'static str, &'static str) {
    // PostgreSQL documentation, appendix A: error codes.
    match code.unwrap_or_default() {
        "28P01" => (
            "it does not accept the password",
            "see the password in the URL; special characters are written in percents (`@` is %40)",
        ),
        "28000" => (
            "it does not let this role in",
            "see that the role exists and may LOGIN, and that pg_hba.conf admits it from here",
        ),
        "3D000" => {
            ("there is no database of this name", "create it, or correct the end of the URL")
        }
        "42501" => {
            ("this role may not use the database", "GRANT CONNECT ON DATABASE … TO the role")
        }
        "53300" => (
            "it has no connection free",
            "raise max_connections at the server, or close other clients",
        ),
        "57P03" => ("it is starting up or shutting down", "try again in a moment"),
        _ => ("it refuses the connection", "see the server's log"),
    }
}

fn distrusted(error: &rustls::Error) -> (&'static str, &'static str) {
    use rustls::CertificateError::{
        Expired, ExpiredContext, NotValidForName, NotValidForNameContext, NotValidYet,
        NotValidYetContext, UnknownIssuer,
    };
    let rustls::Error::InvalidCertificate(error) = error else {
        return ("no TLS connection comes about", "see the server's log");
    };
    if matches!(error, UnknownIssuer) {
        return (
            "its certificate was issued by nobody whom this machine trusts",
            "add `sslrootcert=/path/to/ca.pem` to the URL, with the certificate of its authority",
        );
    }
    if matches!(error, NotValidForName | NotValidForNameContext { .. }) {
        return (
            "its certificate is for another name than the URL's host",
            "write the name of the certificate into the URL; `sslmode=verify-ca` checks no name",
        );
    }
    if matches!(error, Expired | ExpiredContext { .. } | NotValidYet | NotValidYetContext { .. }) {
        return (
            "its certificate is not valid at this time",
            "renew it, and see the clocks of both machines",
        );
    }
    ("its certificate cannot be verified", "see which certificate the server has")
}

fn unreachable_because(kind: io::ErrorKind) -> (&'static str, &'static str) {
    if kind == io::ErrorKind::ConnectionRefused {
        return (
            "nothing listens there",
            "see host and port of the URL, and whether the server runs",
        );
    }
    if kind == io::ErrorKind::NotFound {
        return ("there is no such socket", "see the path in the URL, and whether the server runs");
    }
    if kind == io::ErrorKind::PermissionDenied {
        return (
            "its socket cannot be opened",
            "run as a user that may enter the socket's directory",
        );
    }
    if matches!(kind, io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset) {
        return (
            "it closes the connection",
            "see the server's log, and whether the URL names PostgreSQL",
        );
    }
    (
        "it cannot be reached",
        "see the host of the URL, and whether the network lets this machine through",
    )
}

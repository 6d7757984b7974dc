//! Where an exposed service's connections go.

use std::{fmt, io, str::FromStr};

use tokio::net::TcpStream;

use crate::error::{Error, ErrorKind};

/// A host and port that this machine can connect to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    host: String,
    port: u16,
}

/// Well-known ports: what is announced about a service, and what people call it.
const PROTOCOLS: [(u16, &str); 10] = [
    (22, "ssh"),
    (80, "http"),
    (443, "https"),
    (3306, "mysql"),
    (5432, "postgres"),
    (5672, "amqp"),
    (6379, "redis"),
    (8080, "http"),
    (9200, "elasticsearch"),
    (27017, "mongodb"),
];

impl Target {
    /// The host, a name or an address without brackets.
    pub(crate) fn host(&self) -> &str {
        &self.host
    }

    /// The port.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// What is probably spoken there, by the port alone.
    #[must_use]
    pub fn protocol(&self) -> &'static str {
        PROTOCOLS.iter().find(|(port, _)| *port == self.port).map_or("tcp", |(_, name)| name)
    }

    pub(crate) async fn connect(&self) -> io::Result<TcpStream> {
        TcpStream::connect((self.host.as_str(), self.port)).await
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "[{}]:{}", self.host, self.port)
        } else {
            write!(f, "{}:{}", self.host, self.port)
        }
    }
}

impl FromStr for Target {
    type Err = Error;

    /// Reads `host:port`, `[::1]:port`, `:port` or `port`; without a host it is this machine.
    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = || {
            Error::new(ErrorKind::Usage, format_args!("`{text}` is not a target"))
                .hint("a target is `host:port`, such as `localhost:5432`, or a port alone")
        };
        let (host, port) = text.rsplit_once(':').unwrap_or(("", text));
        let host = match host.strip_prefix('[').map(|rest| rest.strip_suffix(']')) {
            Some(Some(address)) => address,
            Some(None) => return Err(wrong()),
            None if host.contains(':') => return Err(wrong()),
            None if host.is_empty() => "localhost",
            None => host,
        };
        let digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
        let port = port.parse().ok().filter(|port| digits && *port != 0).ok_or_else(wrong)?;
        if host.is_empty() || host.chars().any(|c| c.is_whitespace() || c.is_control() || c == '/')
        {
            return Err(wrong());
        }
        Ok(Self { host: host.to_owned(), port })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(input: &str, expected: Option<&str>) {
        assert_eq!(
            input.parse::<Target>().ok().map(|target| target.to_string()).as_deref(),
            expected
        );
    }

    #[test]
    fn targets_are_a_host_and_a_port() {
        check("localhost:5432", Some("localhost:5432"));
        check("10.1.2.3:80", Some("10.1.2.3:80"));
        check("[::1]:6379", Some("[::1]:6379"));
        check(":5432", Some("localhost:5432"));
        check("5432", Some("localhost:5432"));
        for bad in ["", ":", "localhost", "localhost:", "localhost:0", "localhost:65536", "::1:80"]
        {
            check(bad, None);
        }
        for bad in ["[::1:80", "http://localhost:80", "a b:80", "localhost:+80", "localhost: 80"] {
            check(bad, None);
        }
    }

    #[test]
    fn protocol_follows_the_port() {
        assert_eq!("db:5432".parse::<Target>().expect("target").protocol(), "postgres");
        assert_eq!("db:15432".parse::<Target>().expect("target").protocol(), "tcp");
    }
}

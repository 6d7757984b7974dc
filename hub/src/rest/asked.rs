//! What a request for the REST interface asks, before anybody looks whether it may: pure functions of what
//! strangers send.

use std::{collections::HashMap, str::FromStr};

use connect_spec::{audit::Scope, control::ApiKey, ids::TunnelId};
use http::{HeaderMap, header};

use crate::{
    limits::{DEFAULT_REST_PAGE, MAX_KIND_BYTES, MAX_NUMBER_DIGITS, MAX_REST_PAGE},
    problem::Problem,
};

/// What can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// The document that describes all of this.
    OpenApi,
    /// What is exposed.
    Services,
    /// Who belongs to the workspace.
    Agents,
    /// Which tunnels there are.
    Tunnels,
    /// One of them.
    Tunnel(TunnelId),
    /// What guests were given.
    Shares,
    /// What happened.
    Audit,
    /// The WebSockets, which are served elsewhere when they are asked for as they should be.
    Socket,
}

impl Route {
    /// The resource of a path; `None` when there is none.
    #[must_use]
    pub fn of(path: &str) -> Option<Self> {
        Some(match path.strip_prefix("/v1/")? {
            "openapi.json" => Self::OpenApi,
            "services" => Self::Services,
            "agents" => Self::Agents,
            "tunnels" => Self::Tunnels,
            "shares" => Self::Shares,
            "audit" => Self::Audit,
            "agent" | "tunnel" => Self::Socket,
            other => Self::Tunnel(other.strip_prefix("tunnels/")?.parse().ok()?),
        })
    }

    /// The methods, and what a key needs for it.
    #[must_use]
    pub fn needs(self) -> (&'static str, Scope) {
        match self {
            Self::OpenApi | Self::Services | Self::Agents | Self::Tunnels | Self::Shares => {
                ("GET, HEAD", Scope::Read)
            }
            Self::Socket => ("GET", Scope::Read),
            Self::Audit => ("GET, HEAD", Scope::Audit),
            Self::Tunnel(_) => ("DELETE", Scope::Write),
        }
    }
}

/// The key in `Authorization: Bearer KEY`.
#[must_use]
pub fn bearer(headers: &HeaderMap) -> Option<ApiKey> {
    let shown = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    shown
        .and_then(|text| text.split_once(' '))
        .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("Bearer"))
        .and_then(|(_, key)| ApiKey::parse(key.trim()))
}

/// The parameters of a request. Each may come once; what nobody asks for is refused, since a filter with
/// a misspelt name would let everything through.
#[derive(Debug)]
pub struct Query(HashMap<String, String>);

impl Query {
    /// Reads what follows the `?`.
    ///
    /// # Errors
    /// [`Problem`] when it is malformed, or a parameter comes twice.
    pub fn parse(text: &str) -> Result<Self, Problem> {
        let pairs: Vec<(String, String)> = serde_urlencoded::from_str(text)
            .map_err(|_| Problem::bad_request("the query is malformed"))?;
        let mut parameters = HashMap::new();
        for (name, value) in pairs {
            if parameters.insert(name, value).is_some() {
                return Err(Problem::bad_request("a parameter comes twice"));
            }
        }
        Ok(Self(parameters))
    }

    /// Takes a parameter.
    ///
    /// # Errors
    /// [`Problem`] when it is there and malformed.
    pub fn take<T: FromStr>(&mut self, name: &'static str) -> Result<Option<T>, Problem> {
        let value = self.0.remove(name).map(|value| value.parse());
        let wrong = |_| Problem::bad_request(format!("the parameter `{name}` is malformed"));
        value.transpose().map_err(wrong)
    }

    /// As it is in JSON, where Rust's parser would take a sign and zeros before it.
    ///
    /// # Errors
    /// As [`Query::take`].
    pub fn number(&mut self, name: &'static str) -> Result<Option<u64>, Problem> {
        Ok(self.take(name)?.map(|Number(number)| number))
    }

    /// How many rows are asked for.
    ///
    /// # Errors
    /// [`Problem`] when it is no number from 1 to [`MAX_REST_PAGE`].
    pub fn limit(&mut self) -> Result<usize, Problem> {
        let limit = self.number("limit")?.map(usize::try_from);
        let limit = limit.unwrap_or(Ok(DEFAULT_REST_PAGE)).unwrap_or(usize::MAX);
        if !(1..=MAX_REST_PAGE).contains(&limit) {
            let detail = format!("the parameter `limit` is from 1 to {MAX_REST_PAGE}");
            return Err(Problem::bad_request(detail));
        }
        Ok(limit)
    }

    /// Says that all parameters that mean something were taken.
    ///
    /// # Errors
    /// [`Problem`] when others are left.
    pub fn end(&self) -> Result<(), Problem> {
        if self.0.is_empty() {
            return Ok(());
        }
        Err(Problem::bad_request("the query has a parameter that this resource does not know"))
    }
}

/// A number that is not negative, in its one spelling.
struct Number(u64);

impl FromStr for Number {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        let number: u64 = text.parse().map_err(|_| Malformed)?;
        if number.to_string() == text && text.len() <= MAX_NUMBER_DIGITS {
            Ok(Self(number))
        } else {
            Err(Malformed)
        }
    }
}

/// What a kind of event can be called; whether there is such a kind, a later version may see otherwise.
#[derive(Debug)]
pub struct Kind(pub(super) String);

impl FromStr for Kind {
    type Err = Malformed;

    fn from_str(text: &str) -> Result<Self, Malformed> {
        let name = text.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
        if name && (1..=MAX_KIND_BYTES).contains(&text.len()) {
            Ok(Self(text.to_owned()))
        } else {
            Err(Malformed)
        }
    }
}

/// Why a text is none of these.
#[derive(Debug)]
pub struct Malformed;

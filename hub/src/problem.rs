//! What an HTTP request is refused with: problem details (RFC 9457).

use std::time::Duration;

use http::{HeaderValue, StatusCode, header};
use serde::Serialize;
use warp::reply::{Reply as _, Response};

/// Why a request is not answered.
#[derive(Debug)]
pub struct Problem {
    /// The status.
    pub status: StatusCode,
    /// What a person can make of it.
    pub detail: String,
    /// When to try again.
    pub retry_in: Option<Duration>,
    /// The methods that would be answered.
    pub allow: Option<&'static str>,
}

impl Problem {
    /// A problem of a status.
    #[must_use]
    pub fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self { status, detail: detail.into(), retry_in: None, allow: None }
    }

    /// `400 Bad Request`.
    #[must_use]
    pub fn bad_request(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, detail)
    }

    /// `404 Not Found`: also for what is there and not for this caller.
    #[must_use]
    pub fn not_found() -> Self {
        Self::new(StatusCode::NOT_FOUND, "there is nothing here")
    }

    /// The response.
    #[must_use]
    pub fn into_response(self) -> Response {
        #[derive(Serialize)]
        struct Body<'p> {
            r#type: &'static str,
            title: &'static str,
            status: u16,
            detail: &'p str,
        }
        let Self { status, detail, retry_in, allow } = self;
        let body = Body {
            r#type: "about:blank",
            title: status.canonical_reason().unwrap_or_default(),
            status: status.as_u16(),
            detail: &detail,
        };
        let mut response = json(status, "application/problem+json", &body);
        let headers = response.headers_mut();
        if let Some(wait) = retry_in {
            // Whole seconds, and never so few that the caller comes too early.
            let seconds = u64::try_from(wait.as_millis().div_ceil(1000)).unwrap_or(u64::MAX).max(1);
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if let Some(methods) = allow {
            headers.insert(header::ALLOW, HeaderValue::from_static(methods));
        }
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// A response of JSON.
pub fn json<T: Serialize>(status: StatusCode, media_type: &'static str, body: &T) -> Response {
    let text = serde_json::to_string(body).expect("plain data becomes JSON");
    document(status, media_type, text)
}

/// A response that nobody keeps.
pub fn document(status: StatusCode, media_type: &'static str, text: String) -> Response {
    let mut response = warp::reply::with_status(text, status).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(media_type));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

//! What a subscriber sees, for all of this process: spans and events with their fields.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

/// The fields of a span or an event, as text.
#[derive(Clone, Debug, Default)]
pub(crate) struct Fields(BTreeMap<&'static str, String>);

impl Fields {
    /// The field, or "" if it was not recorded.
    pub(crate) fn of(&self, field: &str) -> &str {
        self.0.get(field).map_or("", String::as_str)
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.insert(field.name(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name(), value.to_owned());
    }
}

/// A span, once it is closed or as far as it is.
#[derive(Clone, Debug)]
pub(crate) struct Span {
    pub(crate) name: &'static str,
    pub(crate) fields: Fields,
}

/// An event, and the key of the span in which it happened.
#[derive(Clone, Debug)]
pub(crate) struct Told {
    pub(crate) level: Level,
    pub(crate) fields: Fields,
    pub(crate) span: Option<Span>,
}

impl Told {
    pub(crate) fn message(&self) -> &str {
        self.fields.of("message")
    }

    /// The key that it is about.
    fn key(&self) -> &str {
        match (self.fields.of("key"), &self.span) {
            ("", Some(span)) => span.fields.of("key"),
            (key, _) => key,
        }
    }
}

#[derive(Default)]
struct Seen {
    spans: Vec<(u64, Span)>,
    told: Vec<Told>,
}

fn seen() -> MutexGuard<'static, Seen> {
    static SEEN: Mutex<Seen> = Mutex::new(Seen {
        spans: Vec::new(),
        told: Vec::new(),
    });
    SEEN.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Collect;

impl<S: Subscriber + for<'s> LookupSpan<'s>> Layer<S> for Collect {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, _: Context<'_, S>) {
        let metadata = attributes.metadata();
        if metadata.target() != "dlock" {
            return;
        }
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        let name = metadata.name();
        // Numbers are used again.
        let mut seen = seen();
        seen.spans.push((id.into_u64(), Span { name, fields }));
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, _: Context<'_, S>) {
        let mut seen = seen();
        let span = seen
            .spans
            .iter_mut()
            .rev()
            .find(|(of, _)| *of == id.into_u64());
        if let Some((_, span)) = span {
            values.record(&mut span.fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        if event.metadata().target() != "dlock" {
            return;
        }
        let mut fields = Fields::default();
        event.record(&mut fields);
        let span = context.event_span(event).map(|span| span.id().into_u64());
        let mut seen = seen();
        let span = span.and_then(|id| {
            let span = seen.spans.iter().rev().find(|(of, _)| *of == id);
            span.map(|(_, span)| span.clone())
        });
        seen.told.push(Told {
            level: *event.metadata().level(),
            fields,
            span,
        });
    }
}

/// From here on, everything is seen.
pub(crate) fn watch() {
    static ONCE: OnceLock<()> = OnceLock::new();
    ONCE.get_or_init(|| {
        let subscriber = tracing_subscriber::registry().with(Collect);
        tracing::subscriber::set_global_default(subscriber).expect("nobody else sets it");
    });
}

/// Text as a key is shown.
pub(crate) fn shown(key: &str) -> String {
    dlock_core::LockKey::from(key).to_string()
}

/// The spans of a key, in their order.
pub(crate) fn spans(name: &str, key: &str) -> Vec<Fields> {
    let seen = seen();
    let spans = seen.spans.iter().map(|(_, span)| span);
    let of_key = spans.filter(|span| span.name == name && span.fields.of("key") == key);
    of_key.map(|span| span.fields.clone()).collect()
}

/// The events of a key, in their order.
pub(crate) fn told(key: &str) -> Vec<Told> {
    let seen = seen();
    let of_key = seen.told.iter().filter(|told| told.key() == key);
    of_key.cloned().collect()
}

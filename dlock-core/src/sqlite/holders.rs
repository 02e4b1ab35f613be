//! Holders as one text, because an SQL function answers with one value. There is a line for each holder: its session,
//! its id, 1 if exclusive, 1 if granted, microseconds since the Unix epoch or `-`, and the application's name.

use std::time::SystemTime;

use crate::{Holder, Mode};

pub(super) fn write(holders: &[(i64, Holder)]) -> String {
    let mut text = String::new();
    for (session, holder) in holders {
        let exclusive = i64::from(holder.mode == Mode::Exclusive);
        let granted = i64::from(holder.granted);
        let since = holder
            .since
            .and_then(|since| since.duration_since(SystemTime::UNIX_EPOCH).ok())
            .map_or("-".into(), |since| since.as_micros().to_string());
        let name = holder.application_name.as_deref().unwrap_or_default();
        let name = name.replace(['\n', '\r'], " ");
        let id = holder.backend_id;
        text += &format!("{session} {id} {exclusive} {granted} {since} {name}\n");
    }
    text
}

pub(super) fn read(text: &str) -> Vec<Holder> {
    let holder = |line: &str| {
        let mut parts = line.splitn(6, ' ');
        let mut number = || parts.next()?.parse().ok();
        let [_session, id, exclusive, granted] = [number()?, number()?, number()?, number()?];
        let since = parts.next()?.parse().ok();
        let name = parts.next().map(str::to_owned);
        Some(Holder::from_columns(
            id, name, None, exclusive, granted, since,
        ))
    };
    text.lines().filter_map(holder).collect()
}

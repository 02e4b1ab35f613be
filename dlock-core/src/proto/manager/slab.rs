/// Values under numbers that are never used again.
#[derive(Debug)]
pub(super) struct Slab<T> {
    slots: Vec<(u32, Option<T>)>,
    free: Vec<u32>,
}

/// The number of a value: the slot, and how often the slot was used before.
pub(super) type Id = u64;

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
        }
    }
}

impl<T> Slab<T> {
    pub(super) fn insert(&mut self, value: T) -> Id {
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push((0, None));
            (self.slots.len() - 1) as u32
        });
        let slot = &mut self.slots[index as usize];
        slot.1 = Some(value);
        u64::from(slot.0) << 32 | u64::from(index)
    }

    pub(super) fn get(&self, id: Id) -> Option<&T> {
        let (used, value) = self.slots.get(id as u32 as usize)?;
        value.as_ref().filter(|_| *used == (id >> 32) as u32)
    }

    pub(super) fn get_mut(&mut self, id: Id) -> Option<&mut T> {
        let (used, value) = self.slots.get_mut(id as u32 as usize)?;
        value.as_mut().filter(|_| *used == (id >> 32) as u32)
    }

    pub(super) fn remove(&mut self, id: Id) -> Option<T> {
        self.get(id)?;
        let slot = self.slots.get_mut(id as u32 as usize)?;
        slot.0 = slot.0.wrapping_add(1);
        self.free.push(id as u32);
        slot.1.take()
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (Id, &T)> {
        self.slots.iter().enumerate().filter_map(|(index, slot)| {
            let value = slot.1.as_ref()?;
            Some((u64::from(slot.0) << 32 | index as u64, value))
        })
    }

    pub(super) fn ids(&self) -> Vec<Id> {
        self.iter().map(|(id, _)| id).collect()
    }
}

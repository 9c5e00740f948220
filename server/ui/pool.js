// The pool as the page knows it: one row per block in typed arrays, kept up to date by the server's frames.
//
// Knows what a frame means; does not know how anything is drawn. Block 0 is padding and never shown.

export const FREE = 0, CACHED = 1, IN_USE = 2, SHARED = 3;
export const STATES = ["free", "cached", "in use", "shared"];

// What happened to a block in the last frame.
export const TAKEN = 1, REUSED = 2, EVICTED = 3;

const stateOf = (refs, kept) => (refs > 1 ? SHARED : refs === 1 ? IN_USE : kept ? CACHED : FREE);

export class Pool {
  constructor() {
    this.size = 0; // blocks, without block 0
    this.sequence = -1;
    this.seen = { taken: 0, reused: 0, evicted: 0 }; // since the page was opened
    this.lanes = [];
    this.lanesLeftOut = 0;
    this.tenantNames = [];
    this.nowDs = 0;
    this.nowAt = 0;
    this.resize(0);
  }

  resize(rows) {
    const make = () => new Uint32Array(rows);
    [this.refs, this.owners, this.tenants, this.positions] = [make(), make(), make(), make()];
    [this.parents, this.taken, this.idle] = [make(), make(), make()];
    this.kept = new Uint8Array(rows);
    this.state = new Uint8Array(rows);
    this.event = new Uint8Array(rows);
    this.counts = [0, 0, 0, 0];
    this.size = Math.max(0, rows - 1);
  }

  /** Takes over a frame; returns the ids that changed, or null where all may have. */
  apply(frame, atMs) {
    this.nowDs = frame.now_ds;
    this.nowAt = atMs;
    this.sequence = frame.sequence;
    this.tenantNames = frame.tenant_names;
    this.lanes = frame.lanes;
    this.lanesLeftOut = frame.lanes_left_out;
    return frame.full ? this.#replace(frame) : this.#change(frame);
  }

  #replace(frame) {
    if (frame.n !== this.refs.length) this.resize(frame.n);
    this.refs.set(frame.refs);
    this.kept.set(frame.kept);
    this.owners.set(frame.owners);
    this.tenants.set(frame.tenants);
    this.positions.set(frame.positions);
    this.parents.set(frame.parents);
    this.taken.set(frame.taken_ds);
    this.idle.set(frame.idle_ds);
    this.event.fill(0);
    this.counts = [0, 0, 0, 0];
    for (let id = 1; id < frame.n; id++) this.counts[(this.state[id] = stateOf(this.refs[id], this.kept[id]))]++;
    return null;
  }

  #change(frame) {
    const { ids } = frame;
    const { state, event, refs, kept, owners, tenants, positions, parents, taken, idle, counts, size } = this;
    for (let row = 0; row < ids.length; row++) {
      const id = ids[row];
      if (id === 0 || id > size) continue;
      const before = state[id];
      const after = stateOf(frame.refs[row], frame.kept[row]);
      const otherContent = taken[id] !== frame.taken_ds[row] || owners[id] !== frame.owners[row];
      event[id] = this.#note(before, after, otherContent, idle[id] !== frame.idle_ds[row]);
      counts[before]--;
      counts[after]++;
      state[id] = after;
      refs[id] = frame.refs[row];
      kept[id] = frame.kept[row];
      owners[id] = frame.owners[row];
      tenants[id] = frame.tenants[row];
      positions[id] = frame.positions[row];
      parents[id] = frame.parents[row];
      taken[id] = frame.taken_ds[row];
      idle[id] = frame.idle_ds[row];
    }
    return ids;
  }

  /**
   * Names the change of one block; much may have happened since the frame before. A cached block with other
   * content was evicted on the way; one that is idle since another moment was used in between.
   */
  #note(before, after, otherContent, otherIdle) {
    const taken = after !== FREE && otherContent;
    if (taken) this.seen.taken++;
    if (before === CACHED && (after === FREE || otherContent)) return this.seen.evicted++, EVICTED;
    if (taken) return TAKEN;
    const reused = before === CACHED ? after >= IN_USE || (after === CACHED && otherIdle) : before === IN_USE && after === SHARED;
    return reused ? (this.seen.reused++, REUSED) : 0;
  }

  /** Engine time now, in tenths of a second: frames come only when something changes. */
  clock(atMs) {
    return this.nowDs + (atMs - this.nowAt) / 100;
  }

  /** Seconds since the block was last used: 0 while it is in use. */
  idleSeconds(id, atMs) {
    return this.state[id] === CACHED ? Math.max(0, this.clock(atMs) - this.idle[id]) / 10 : 0;
  }

  ageSeconds(id, atMs) {
    return this.state[id] === FREE ? 0 : Math.max(0, this.clock(atMs) - this.taken[id]) / 10;
  }

  /** The block before this one in its chain, 0 at the start or where it is gone. */
  parent(id) {
    const parent = this.parents[id];
    const holds = parent && parent <= this.size && this.kept[parent] && this.positions[parent] + 1 === this.positions[id];
    return holds ? parent : 0;
  }

  tenant(id) {
    return this.tenantNames[this.tenants[id]] ?? "";
  }

  laneOf(owner) {
    return this.lanes.find((lane) => Number(lane.id) === owner);
  }

  /** From the first block of the chain down to this one. */
  chain(id) {
    const path = [id];
    for (let at = this.parent(id); at && path.length <= this.size; at = this.parent(at)) path.push(at);
    return path.reverse();
  }
}

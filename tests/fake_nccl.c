/* NCCL's functions over host memory, for ranks that are threads: what tests/unit/test_nccl.py links in its place.
 *
 * A collective begins when every rank of the group has called it and ends when all have taken what is theirs. Unlike
 * NCCL it is over when the call returns, and ranks that disagree about it are all refused.
 */
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE_ERROR = 6 };
enum { MAX_RANKS = 8, MAX_CALLS = 64, MAX_GROUPS = 256 };
enum { UINT8 = 1, INT64 = 4, FLOAT32 = 7, FLOAT64 = 8, BFLOAT16 = 9 };
enum { ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, BROADCAST };

typedef struct { char internal[128]; } UniqueId;
typedef struct { int kind; const void *source; void *target; size_t count; int type, root; } Call;
typedef struct { const void *from; void *to; size_t bytes; int peer; } Piece;
typedef struct {
    int size, present, arrived, round;
    Call *calls[MAX_RANKS];
    Piece *mail[MAX_RANKS][MAX_RANKS]; /* from, to */
    UniqueId id;
} Group;
typedef struct { Group *group; int rank, aborted; void *stream; } Communicator;

static Group groups[MAX_GROUPS];
static int num_groups, num_alive;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static void *last_stream;

static __thread int together, num_pieces;
static __thread Piece pieces[MAX_CALLS];
static __thread Communicator *together_on;

const char *ncclGetErrorString(int code) {
    switch (code) {
        case INVALID_ARGUMENT: return "invalid argument";
        case INVALID_USAGE: return "invalid usage";
        case REMOTE_ERROR: return "remote process exited or there was a network error";
        default: return "unhandled system error";
    }
}
const char *ncclGetLastError(void *communicator) { return communicator ? "" : "said by the fake"; }
int ncclGetVersion(int *version) { *version = 22907; return SUCCESS; }

int ncclGetUniqueId(UniqueId *id) {
    pthread_mutex_lock(&lock);
    for (size_t i = 0; i < sizeof id->internal; i++) id->internal[i] = (char)(rand() & 0xff);
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}

int ncclCommInitRank(void **communicator, int size, UniqueId id, int rank) {
    if (size < 1 || size > MAX_RANKS || rank < 0 || rank >= size) return INVALID_ARGUMENT;
    pthread_mutex_lock(&lock);
    Group *group = NULL;
    for (int i = 0; i < num_groups; i++)
        if (!memcmp(&groups[i].id, &id, sizeof id)) group = &groups[i];
    if (!group) {
        group = &groups[num_groups++];
        group->id = id;
        group->size = size;
    }
    group->present++;
    num_alive++;
    pthread_cond_broadcast(&changed);
    while (group->present < size) pthread_cond_wait(&changed, &lock);
    Communicator *made = calloc(1, sizeof *made);
    made->group = group;
    made->rank = rank;
    *communicator = made;
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}

/* Its memory stays: a call that hangs in it may look at it once more. */
int ncclCommAbort(Communicator *communicator) {
    pthread_mutex_lock(&lock);
    communicator->aborted = 1;
    num_alive--;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
    return SUCCESS;
}

/* For tests: communicators that were made and not aborted, and the stream of the last call. */
int fake_alive(void) { return num_alive; }
void *fake_stream(void) { return last_stream; }

static double number(const void *memory, size_t index, int type) {
    if (type == INT64) return (double)((const int64_t *)memory)[index];
    if (type == FLOAT32) return ((const float *)memory)[index];
    if (type == FLOAT64) return ((const double *)memory)[index];
    uint32_t bits = (uint32_t)((const uint16_t *)memory)[index] << 16; /* bfloat16 */
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static void store(void *memory, size_t index, int type, double value) {
    if (type == INT64) ((int64_t *)memory)[index] = (int64_t)value;
    else if (type == FLOAT32) ((float *)memory)[index] = (float)value;
    else if (type == FLOAT64) ((double *)memory)[index] = value;
    else {
        float single = (float)value;
        uint32_t bits;
        memcpy(&bits, &single, 4);
        ((uint16_t *)memory)[index] = (uint16_t)(bits >> 16); /* exact where sums are */
    }
}
static size_t width(int type) {
    switch (type) {
        case UINT8: return 1;
        case BFLOAT16: return 2;
        case FLOAT32: return 4;
        case INT64: case FLOAT64: return 8;
        default: return 0; /* not known here */
    }
}

/* Wait until every rank has come to this point; non-zero if this one was aborted meanwhile. */
static int meet(Communicator *own) {
    Group *group = own->group;
    int round = group->round;
    if (++group->arrived == group->size) {
        group->arrived = 0;
        group->round++;
        pthread_cond_broadcast(&changed);
    }
    while (group->round == round && !own->aborted) pthread_cond_wait(&changed, &lock);
    return own->aborted;
}

static int agree(Group *group) {
    Call *first = group->calls[0];
    for (int r = 1; r < group->size; r++) {
        Call *call = group->calls[r];
        if (call->kind != first->kind || call->count != first->count) return 0;
        if (call->type != first->type || call->root != first->root) return 0;
    }
    return 1;
}

/* What this rank gets, into memory of its own: others still read what it gave. */
static char *take(Communicator *own, size_t *bytes) {
    Group *group = own->group;
    Call *call = group->calls[own->rank];
    size_t one = width(call->type), elements = call->kind == ALL_GATHER ? call->count * group->size : call->count;
    *bytes = elements * one;
    char *result = malloc(*bytes + 1);
    if (call->kind == BROADCAST) memcpy(result, group->calls[call->root]->source, *bytes);
    for (int r = 0; r < group->size && call->kind == ALL_GATHER; r++)
        memcpy(result + r * call->count * one, group->calls[r]->source, call->count * one);
    if (call->kind == ALL_REDUCE || call->kind == REDUCE_SCATTER) {
        size_t first = call->kind == REDUCE_SCATTER ? own->rank * call->count : 0;
        for (size_t i = 0; i < elements; i++) {
            double sum = 0;
            for (int r = 0; r < group->size; r++) sum += number(group->calls[r]->source, first + i, call->type);
            store(result, i, call->type, sum);
        }
    }
    return result;
}

static int perform(Communicator *own, Call *call, void *stream) {
    pthread_mutex_lock(&lock);
    own->stream = last_stream = stream;
    own->group->calls[own->rank] = call;
    int code = SUCCESS;
    if (meet(own)) code = REMOTE_ERROR;
    else if (!agree(own->group)) code = meet(own) ? REMOTE_ERROR : INVALID_ARGUMENT;
    else {
        size_t bytes;
        char *result = take(own, &bytes);
        if (meet(own)) code = REMOTE_ERROR;
        else memcpy(call->target, result, bytes);
        free(result);
    }
    pthread_mutex_unlock(&lock);
    return code;
}

static int collective(Call call, Communicator *own, void *stream) {
    if (together || !call.count || !call.source || !call.target) return INVALID_USAGE;
    int sums = call.kind == ALL_REDUCE || call.kind == REDUCE_SCATTER;
    return width(call.type) > (size_t)sums ? perform(own, &call, stream) : INVALID_ARGUMENT;
}

int ncclAllReduce(
    const void *source, void *target, size_t count, int type, int op, Communicator *own, void *stream) {
    return op ? INVALID_ARGUMENT : collective((Call){ALL_REDUCE, source, target, count, type, 0}, own, stream);
}
int ncclReduceScatter(
    const void *source, void *target, size_t count, int type, int op, Communicator *own, void *stream) {
    return op ? INVALID_ARGUMENT : collective((Call){REDUCE_SCATTER, source, target, count, type, 0}, own, stream);
}
int ncclAllGather(const void *source, void *target, size_t count, int type, Communicator *own, void *stream) {
    return collective((Call){ALL_GATHER, source, target, count, type, 0}, own, stream);
}
int ncclBroadcast(
    const void *source, void *target, size_t count, int type, int root, Communicator *own, void *stream) {
    return collective((Call){BROADCAST, source, target, count, type, root}, own, stream);
}

static int piece(Piece given, int type, Communicator *own, void *stream) {
    if (!together || num_pieces == MAX_CALLS) return INVALID_USAGE;
    if (given.peer < 0 || given.peer >= own->group->size) return INVALID_USAGE;
    given.bytes *= width(type);
    pieces[num_pieces++] = given;
    together_on = own;
    own->stream = stream;
    return SUCCESS;
}
int ncclSend(const void *source, size_t count, int type, int peer, Communicator *own, void *stream) {
    return piece((Piece){.from = source, .bytes = count, .peer = peer}, type, own, stream);
}
int ncclRecv(void *target, size_t count, int type, int peer, Communicator *own, void *stream) {
    return piece((Piece){.to = target, .bytes = count, .peer = peer}, type, own, stream);
}

int ncclGroupStart(void) {
    num_pieces = 0;
    together_on = NULL;
    return together++ ? INVALID_USAGE : SUCCESS;
}

/* Pieces are handed from rank to rank: who has nothing for anybody need not come. */
int ncclGroupEnd(void) {
    if (!together--) return INVALID_USAGE;
    Communicator *own = together_on;
    if (!own) return SUCCESS;
    int code = SUCCESS;
    pthread_mutex_lock(&lock);
    last_stream = own->stream;
    for (int p = 0; p < num_pieces; p++)
        if (pieces[p].from) own->group->mail[own->rank][pieces[p].peer] = &pieces[p];
    pthread_cond_broadcast(&changed);
    for (int p = 0; p < num_pieces; p++) {
        Piece **letter = pieces[p].to ? &own->group->mail[pieces[p].peer][own->rank] : NULL;
        while (letter && !*letter && !own->aborted) pthread_cond_wait(&changed, &lock);
        if (!letter || own->aborted) continue;
        if ((*letter)->bytes != pieces[p].bytes) code = INVALID_ARGUMENT;
        else memcpy(pieces[p].to, (*letter)->from, pieces[p].bytes);
        *letter = NULL;
        pthread_cond_broadcast(&changed);
    }
    for (int p = 0; p < num_pieces; p++) {
        Piece **letter = &own->group->mail[own->rank][pieces[p].peer];
        while (pieces[p].from && *letter == &pieces[p] && !own->aborted) pthread_cond_wait(&changed, &lock);
    }
    if (own->aborted) code = REMOTE_ERROR;
    pthread_mutex_unlock(&lock);
    return code;
}
